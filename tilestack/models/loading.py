"""Checks of a checkpoint around from_pretrained: transformers fills what is missing with random numbers and goes on."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

MODEL_TYPE = "qwen3_moe"


def check_folder(folder: Path) -> None:
    """Look at a checkpoint on this machine before anything is loaded: architecture, and every shard's header.

    Raises ValueError for another architecture, a config.json that is missing or broken, or a shard that is missing,
    truncated or no safetensors file.
    """
    config = folder / "config.json"
    if not config.exists():
        raise ValueError(f"{config}: missing, so {folder} is no checkpoint in Hugging Face format")
    try:
        model_type = json.loads(config.read_text(encoding="utf-8")).get("model_type")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{config}: not a JSON object ({error}); copy it again") from None
    if model_type != MODEL_TYPE:
        raise ValueError(f"{config}: model_type must be {MODEL_TYPE!r}, got {model_type!r}: another architecture")
    for shard in shards(folder):
        if not shard.exists():
            raise ValueError(f"{shard}: missing, but {folder / 'model.safetensors.index.json'} lists it; copy it again")
        try:
            with safe_open(shard, framework="pt"):
                pass
        except SafetensorError as error:
            raise ValueError(f"{shard}: truncated or no safetensors file ({error}); copy it again") from error


def shards(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint: those that its index lists, or all that there are."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        return [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    return sorted(folder.glob("*.safetensors"))


def check_loaded(source: object, loading_info: dict) -> None:
    """Raise ValueError if the checkpoint lacked parameters of the model."""
    missing = sorted(loading_info["missing_keys"])
    if missing:
        listed = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise ValueError(f"{source}: the checkpoint lacks {len(missing)} of the model's parameters: {listed}")
