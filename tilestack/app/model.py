"""The model of a run: from a checkpoint, which is checked first, or new with the sizes of the configuration."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase, Qwen3MoeConfig

from tilestack import Qwen3MoeForCausalLM
from tilestack.app.config import Config, ModelConfig, check_positions
from tilestack.app.errors import UserError
from tilestack.distributed import deepspeed_settings
from tilestack.kernels.device import Device
from tilestack.models import Weights, drawn, pretrained
from tilestack.models.loading import MODEL_TYPE, check_folder


def build(config: Config, tokenizer: PreTrainedTokenizerBase) -> tuple[Qwen3MoeForCausalLM, Weights]:
    """The model on the meta device, and its weights: of the checkpoint, or drawn from train.seed.

    Raises UserError if there is none.
    """
    shape = model_config(config, tokenizer)
    dtype = getattr(torch, config.model.dtype)
    torch.manual_seed(config.train.seed)
    if config.model.path is None:
        return drawn(shape, dtype, config.train.seed, config.kernels)
    try:
        return pretrained(config.model.path, dtype, shape, config.kernels)
    except (OSError, ValueError) as error:
        raise UserError(f"model.path: {error}") from None


def check_model(config: Config) -> None:
    """Raise UserError if model.path is given and cannot be trained: missing, broken, another model, too short.

    Raises SettingsError if the model cannot be split over the processes as asked, UnsupportedError for a kernel that
    cannot run on this machine.
    """
    config.kernels.check(Device.current())
    path = config.model.path
    shape = new_config(config.model, config.data.vocab_size, 0) if path is None else checkpoint_config(path)
    if path is not None:
        check_positions(config.data, shape.max_position_embeddings, f"max_position_embeddings of {path}")
    deepspeed_settings.check_model(config.distributed, shape)


def model_config(config: Config, tokenizer: PreTrainedTokenizerBase) -> Qwen3MoeConfig:
    """transformers' configuration of the model that `build` makes. Raises UserError if a checkpoint does not fit."""
    path = config.model.path
    if path is None:
        return new_config(config.model, len(tokenizer), tokenizer.eos_token_id)
    shape = checkpoint_config(path)
    if len(tokenizer) > shape.vocab_size:
        raise UserError(
            f"the tokenizer has {len(tokenizer)} tokens, the model of {path} only {shape.vocab_size}; "
            "set data.tokenizer to the tokenizer that belongs to the model"
        )
    shape.router_aux_loss_coef = config.model.router_aux_loss_coef
    return shape


def parameters(model: PreTrainedModel) -> int:
    """How many numbers the model learns; under ZeRO-3, where a rank holds a part of each tensor, of all ranks."""
    return sum(getattr(each, "ds_numel", each.numel()) for each in model.parameters())


def new_config(model: ModelConfig, vocab_size: int, end_of_text: int) -> Qwen3MoeConfig:
    """transformers' configuration of a new model: every layer has experts, as in the public models."""
    return Qwen3MoeConfig(
        vocab_size=vocab_size,
        hidden_size=model.hidden,
        intermediate_size=model.expert_hidden * model.experts_per_token,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        num_key_value_heads=model.kv_heads,
        head_dim=model.head_dim,
        num_experts=model.experts,
        num_experts_per_tok=model.experts_per_token,
        moe_intermediate_size=model.expert_hidden,
        norm_topk_prob=True,
        max_position_embeddings=model.max_positions,
        rope_parameters={"rope_type": "default", "rope_theta": model.rope_theta},
        tie_word_embeddings=model.tie_embeddings,
        router_aux_loss_coef=model.router_aux_loss_coef,
        initializer_range=model.hidden**-0.5,  # keeps the size of activations at every width; 0.02 is for width 2048
        bos_token_id=None,
        eos_token_id=end_of_text,
        pad_token_id=end_of_text,
    )


def checkpoint_config(path: str) -> Qwen3MoeConfig:
    """The configuration of a checkpoint. Raises UserError if there is none, or if it is of another architecture."""
    folder = Path(path)
    if not folder.is_dir() and (path.startswith((".", "/", "~")) or path.count("/") != 1):
        raise UserError(f"model.path: the folder {path} does not exist")
    try:
        if folder.is_dir():
            check_folder(folder)
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(f"model.path: {error}") from None
    if config.model_type != MODEL_TYPE:
        raise UserError(f"model.path: {path} is a {config.model_type!r} model; tilestack trains {MODEL_TYPE!r}")
    return config
