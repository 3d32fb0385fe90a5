"""The configuration: one tree of plain dataclasses. `parse.py` fills it from a YAML file and the command line."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from tilestack.app.errors import UserError
from tilestack.distributed.config import DistributedConfig, OptimizerConfig
from tilestack.distributed.deepspeed_settings import check_processes
from tilestack.models import KernelChoice, Recomputation


@dataclass(frozen=True)
class ModelConfig:
    """The model: a Hugging Face checkpoint, or a new Qwen3-MoE of the sizes below.

    path: folder or hub name of a Qwen3-MoE checkpoint to start from; the sizes below are then its own
    dtype: of weights and activations; bfloat16 trains with float32 master weights
    activation_checkpointing: what the backward pass recomputes instead of finding it kept: "none", "selective" (of each
        layer all but attention), "full" (all of each layer)
    activation_offload: with activation_checkpointing, keep the inputs of the layers in the host's memory
    router_aux_loss_coef: weight of the load-balancing loss; 0 turns it off
    layers: decoder layers, each attention and experts
    hidden: width of the residual stream
    heads: query heads
    kv_heads: key and value heads; divides heads
    head_dim: width of one head
    experts: experts in each layer
    experts_per_token: experts that the router gives each token (top-k)
    expert_hidden: width inside one expert
    max_positions: longest sequence the model is made for
    rope_theta: base of the rotary position embedding
    tie_embeddings: share the input embedding with the output layer
    """

    path: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    activation_checkpointing: Recomputation = "none"
    activation_offload: bool = False
    router_aux_loss_coef: float = 0.001
    layers: int = 4
    hidden: int = 128
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    experts: int = 16
    experts_per_token: int = 2
    expert_hidden: int = 64
    max_positions: int = 2048
    rope_theta: float = 10000.0
    tie_embeddings: bool = False


@dataclass(frozen=True)
class DataConfig:
    """The text and how it is cut into batches.

    source: "pydoc" (the language reference inside every Python), a .jsonl, .txt or .parquet file, a folder of such
        files, or the hub name of a data set (owner/name)
    subset: configuration of a hub data set
    split: split of a hub data set
    text_key: field of JSONL, Parquet and hub rows that holds the text
    eval_documents: documents held out for evaluation
    tokenizer: folder or hub name; default: that of model.path, else a byte-level BPE trained on the text
    vocab_size: entries of the BPE that is trained where there is no tokenizer
    sequence_length: documents are cut into pieces of at most this many tokens; tokens attend inside a piece
    micro_batch_tokens: pieces are packed into micro-batches of exactly this many tokens
    """

    source: str = "pydoc"
    subset: str | None = None
    split: str = "train"
    text_key: str = "text"
    eval_documents: int = 4
    tokenizer: str | None = None
    vocab_size: int = 2048
    sequence_length: int = 512
    micro_batch_tokens: int = 1024


@dataclass(frozen=True)
class ScheduleConfig:
    """The learning rate over the run: a linear warm-up to optimizer.lr, then a decay.

    decay: shape of the decay
    warmup_steps: optimizer steps from 0 to the peak
    final_ratio: the last learning rate divided by the peak
    """

    decay: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: int = 10
    final_ratio: float = 0.1


@dataclass(frozen=True)
class TrainConfig:
    """The loop.

    steps: optimizer steps
    micro_batches: micro-batches in one optimizer step, over all processes; each process accumulates its share
    seed: of the weights, the order of documents and the sample
    eval_every: evaluate on the held-out documents every so many steps; 0: only at the end
    eval_micro_batches: at most so many micro-batches of held-out text
    save_every: save a checkpoint every so many steps; 0: only at the end
    keep_checkpoints: delete all but the newest so many
    """

    steps: int = 200
    micro_batches: int = 2
    seed: int = 0
    eval_every: int = 50
    eval_micro_batches: int = 8
    save_every: int = 50
    keep_checkpoints: int = 2


@dataclass(frozen=True)
class OutputConfig:
    """What a run shows and leaves behind.

    folder: each run makes a folder of its own in here
    name: ends the name of the run's folder; default: the configuration file's
    log_every: steps between two readings of the loss from the device
    trackers: any of tensorboard, wandb, trackio, where installed
    export: write the trained model in Hugging Face format at the end
    sample_prompt: text that the trained model continues at the end
    sample_tokens: length of the continuation; 0: none
    sample_temperature: 0 takes the likeliest token
    """

    folder: str = "runs"
    name: str | None = None
    log_every: int = 5
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = field(default_factory=list)
    export: bool = True
    sample_prompt: str = "The "
    sample_tokens: int = 100
    sample_temperature: float = 0.8


@dataclass(frozen=True)
class Config:
    """Everything a run is made of."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    kernels: KernelChoice = field(default_factory=KernelChoice)
    output: OutputConfig = field(default_factory=OutputConfig)


def check(config: Config, world_size: int) -> None:
    """Raise UserError or SettingsError for the first value, or pair of values, that cannot train."""
    _check_at_least(config)
    name = config.output.name
    if name is not None and (not name or "/" in name):
        raise UserError(f"output.name ends the name of a folder inside output.folder, so it has no '/'; got {name!r}")
    if config.model.activation_offload and config.model.activation_checkpointing == "none":
        raise UserError(
            "model.activation_offload keeps the inputs of recomputed layers on the host; set "
            "model.activation_checkpointing to selective or full too"
        )
    if config.model.path is None:
        _check_sizes(config.model)
        check_positions(config.data, config.model.max_positions, "model.max_positions")
    check_processes(config.distributed, world_size)
    with_deepspeed = config.distributed.uses_deepspeed(world_size)
    config.distributed.check_optimizer(config.optimizer, config.model.dtype, with_deepspeed)
    sequence_parallel = config.distributed.sequence_parallel
    _, data_ranks = config.distributed.data_ranks(0, world_size)
    if config.train.micro_batches % data_ranks:
        sharing = f" ({sequence_parallel} of which share each micro-batch)" if sequence_parallel > 1 else ""
        raise UserError(
            f"train.micro_batches = {config.train.micro_batches} does not divide evenly over {world_size} processes"
            f"{sharing}; take a multiple of {data_ranks}"
        )


def check_positions(data: DataConfig, positions: int, where: str) -> None:
    """Raise UserError if a piece of a document could be longer than the model's positions."""
    if data.sequence_length > positions:
        raise UserError(
            f"data.sequence_length = {data.sequence_length} is longer than the model's positions "
            f"({where} = {positions}); take at most {positions}"
        )


def _check_at_least(config: Config) -> None:
    floors = {
        "model": {"router_aux_loss_coef": 0},
        "data": {"eval_documents": 0, "vocab_size": 257, "sequence_length": 2, "micro_batch_tokens": 2},
        "schedule": {"warmup_steps": 0, "final_ratio": 0},
        "train": {
            "steps": 1,
            "micro_batches": 1,
            "eval_micro_batches": 1,
            "keep_checkpoints": 1,
            "eval_every": 0,
            "save_every": 0,
        },
        "output": {"log_every": 1, "sample_tokens": 0, "sample_temperature": 0},
    }
    for group, keys in floors.items():
        for key, floor in keys.items():
            value = getattr(getattr(config, group), key)
            if value < floor:
                raise UserError(f"{group}.{key} must be at least {floor}, got {value}")


def _check_sizes(model: ModelConfig) -> None:
    sizes = ["layers", "hidden", "heads", "kv_heads", "head_dim", "experts", "experts_per_token", "expert_hidden"]
    for key in [*sizes, "max_positions"]:
        if getattr(model, key) < 1:
            raise UserError(f"model.{key} must be at least 1, got {getattr(model, key)}")
    if not 0 < model.rope_theta < math.inf:
        raise UserError(f"model.rope_theta must be a finite number above 0, got {model.rope_theta}")
    if model.heads % model.kv_heads:
        raise UserError(f"model.heads = {model.heads} must be a multiple of model.kv_heads = {model.kv_heads}")
    if model.head_dim % 2:
        raise UserError(f"model.head_dim must be even for rotary positions, got {model.head_dim}")
    if model.experts_per_token > model.experts:
        raise UserError(
            f"model.experts_per_token = {model.experts_per_token} is more than model.experts = {model.experts}"
        )
