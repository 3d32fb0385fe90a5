"""The shape of the model that is planned for, without its weights."""

from __future__ import annotations

import difflib

from transformers import Qwen3MoeConfig

from tilestack.app.config import Config
from tilestack.app.errors import UserError
from tilestack.app.model import checkpoint_config, new_config

COMMON = {
    "vocab_size": 151936, "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8, "num_key_value_heads": 4,
    "norm_topk_prob": True, "tie_word_embeddings": False,
}  # fmt: skip
SHAPES = {
    "Qwen3-30B-A3B": {
        "num_hidden_layers": 48, "hidden_size": 2048, "num_attention_heads": 32, "moe_intermediate_size": 768,
    },
    "Qwen3-235B-A22B": {
        "num_hidden_layers": 94, "hidden_size": 4096, "num_attention_heads": 64, "moe_intermediate_size": 1536,
    },
}  # fmt: skip


def planned_model(name: str | None, layers: int | None, config: Config) -> tuple[str, Qwen3MoeConfig]:
    """(what to call it, its shape): of a known name, a folder or hub name, or the configuration's own.

    layers: in place of the model's own number. Raises UserError if there is no such model.
    """
    if name is None and config.model.path is None:
        shape, name = new_config(config.model, config.data.vocab_size, end_of_text=0), "the configuration's new model"
    else:
        name = name or config.model.path
        shape = _known(name) or _read(name)
    if layers is not None:
        shape.num_hidden_layers = layers
        name = f"{name}, {layers} layers"
    return name, shape


def _known(name: str) -> Qwen3MoeConfig | None:
    sizes = SHAPES.get(name.removeprefix("Qwen/"))
    return None if sizes is None else Qwen3MoeConfig(**COMMON, **sizes)


def _read(name: str) -> Qwen3MoeConfig:
    try:
        return checkpoint_config(name)
    except UserError as error:
        close = difflib.get_close_matches(name, SHAPES, n=1)
        hint = f"; did you mean {close[0]}?" if close else f"; known without a file: {', '.join(SHAPES)}"
        raise UserError(f"{str(error).replace('model.path', '--model')}{hint}") from None
