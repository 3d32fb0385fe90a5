"""The engine's part of a checkpoint: tensors as safetensors, numbers as JSON, and what may be wrong with them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16"}  # those that an engine trains, and safetensors' names for them


class CheckpointError(ValueError):
    """A checkpoint that is incomplete, damaged, or of another model, engine or number of ranks."""


def write_state(folder: Path, state: dict) -> None:
    """Write the engine's numbers; the application makes the folder as a whole appear atomically."""
    (folder / "engine.json").write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")


def read_state(folder: Path, expected: dict) -> dict:
    """Read the engine's numbers and check those of `expected`.

    Raises CheckpointError if the file is missing or broken, or if a number is not the expected one.
    """
    path = folder / "engine.json"
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{folder} holds no engine.json: it is not a complete checkpoint") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is broken: {error}") from None
    for key, value in expected.items():
        if state.get(key) != value:
            raise CheckpointError(f"{folder} was saved with {key}={state.get(key)!r}, this run has {key}={value!r}")
    return state


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write tensors by name into one safetensors file."""
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path)


def read_tensors(path: Path, targets: Mapping[str, torch.Tensor]) -> None:
    """Copy the file's tensors into `targets` in place; nothing is copied before names, shapes and dtypes fit.

    Raises CheckpointError if the file is missing or truncated, or holds other tensors.
    """
    try:
        with safe_open(path, framework="pt") as file:
            _check_names(path, set(file.keys()), set(targets))
            for name, target in targets.items():
                found = file.get_slice(name)
                if found.get_shape() != list(target.shape):
                    raise CheckpointError(
                        f"{path}: {name} has shape {found.get_shape()}, the model has {list(target.shape)}: "
                        "the checkpoint is of another model"
                    )
                if found.get_dtype() != DTYPES[target.dtype]:
                    raise CheckpointError(
                        f"{path}: {name} is {found.get_dtype()}, the model has {DTYPES[target.dtype]}: "
                        "the checkpoint is of another precision"
                    )
            with torch.no_grad():
                for name, target in targets.items():
                    target.copy_(file.get_tensor(name))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: the checkpoint is not complete") from None
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged or truncated: {error}") from None


def _check_names(path: Path, found: set[str], expected: set[str]) -> None:
    missing, extra = sorted(expected - found), sorted(found - expected)
    if missing or extra:
        listed = [f"lacks {', '.join(missing[:3])}"] if missing else []
        listed += [f"has {', '.join(extra[:3])}, which the model has not"] if extra else []
        raise CheckpointError(f"{path} {' and '.join(listed)}: the checkpoint is of another model or precision")
