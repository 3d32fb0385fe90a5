"""The model of a run: from a checkpoint, which is checked first, or new with the sizes of the configuration."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase, Qwen3MoeConfig

from tilestack import Qwen3MoeForCausalLM
from tilestack.app.config import Config, ModelConfig, check_positions
from tilestack.app.errors import UserError
from tilestack.app.files import check_safetensors, read_json
from tilestack.distributed import build_model

ARCHITECTURE = "qwen3_moe"


def build(config: Config, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The model, with weights of the checkpoint or drawn from train.seed. Raises UserError if it cannot be."""
    dtype = getattr(torch, config.model.dtype)
    torch.manual_seed(config.train.seed)
    if config.model.path is None:
        shape = new_config(config.model, len(tokenizer), tokenizer.eos_token_id)
        with build_model(config.distributed, dtype):
            return Qwen3MoeForCausalLM._from_config(shape, dtype=dtype)
    shape = checkpoint_config(config.model.path)
    check_positions(config.data, shape.max_position_embeddings, f"max_position_embeddings of {config.model.path}")
    if len(tokenizer) > shape.vocab_size:
        raise UserError(
            f"the tokenizer has {len(tokenizer)} tokens, the model of {config.model.path} only {shape.vocab_size}; "
            "set data.tokenizer to the tokenizer that belongs to the model"
        )
    shape.router_aux_loss_coef = config.model.router_aux_loss_coef
    with build_model(config.distributed, dtype):
        return _load(config.model.path, shape, dtype)


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
    """The configuration of a checkpoint, whose files are checked if it is a folder.

    Raises UserError: no such checkpoint, another architecture, a shard that is missing or truncated.
    """
    folder = Path(path)
    if folder.is_dir():
        check_folder(folder)
    elif path.startswith((".", "/", "~")) or path.count("/") != 1:
        raise UserError(f"model.path: the folder {path} does not exist")
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(f"model.path: {path} has no readable config.json: {error}") from None
    if config.model_type != ARCHITECTURE:
        raise UserError(f"model.path: {path} is a {config.model_type!r} model; tilestack trains {ARCHITECTURE!r}")
    return config


def check_folder(folder: Path) -> None:
    """Raise UserError unless `folder` holds a Qwen3-MoE's config.json and every shard of its weights, whole."""
    if not (folder / "config.json").is_file():
        raise UserError(f"model.path: {folder} has no config.json; it is not a Hugging Face checkpoint")
    kind = read_json(folder / "config.json").get("model_type")
    if kind != ARCHITECTURE:
        raise UserError(f"model.path: {folder} is a {kind!r} model; tilestack trains {ARCHITECTURE!r}")
    index = folder / "model.safetensors.index.json"
    shards = read_json(index).get("weight_map", {}).values() if index.is_file() else ["model.safetensors"]
    for shard in sorted(set(shards)):
        check_safetensors(folder / shard)


def _load(path: str, shape: Qwen3MoeConfig, dtype: torch.dtype) -> PreTrainedModel:
    try:
        model, report = Qwen3MoeForCausalLM.from_pretrained(
            path,
            config=shape,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, json.JSONDecodeError) as error:
        raise UserError(f"model.path: {path} cannot be loaded: {error}") from None
    missing = sorted(report["missing_keys"])
    if missing:
        raise UserError(f"model.path: {path} lacks {len(missing)} weights of the model, the first is {missing[0]}")
    return model
