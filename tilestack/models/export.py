"""A Hugging Face checkpoint in the hub's layout, written file by file: the whole model is never in memory for it.

`save_pretrained` takes a dictionary of all weights. Here they come one after the other, the fused matrices of experts
also in parts, as many experts at a time as a rank holds; and a file is written as soon as it is full.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from tilestack.models.config_v4 import add_v4_keys
from tilestack.models.files import sync_file
from tilestack.models.hub_layout import matrices_of_experts, stored_name

Part = tuple[str, int, torch.Tensor]  # a parameter's name, where in its first dimension the part begins, the part

FILE_BYTES = 4 << 30


def write_model(model: nn.Module, parts: Iterable[Part], folder: Path) -> None:
    """Write the weights, the index if there are several files, config.json and generation_config.json.

    model: whose configuration is written. parts: each parameter's parts in order, on any device; a part is copied
        before the next is asked for. folder: is made if it is not there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files, where, waiting = [], {}, {}
    total = size = 0

    def flush() -> None:
        path = folder / f".weights-{len(files):05d}.safetensors"
        save_file(waiting, path, metadata={"format": "pt"})
        sync_file(path)
        files.append(path)
        waiting.clear()

    for name, first, part in parts:
        for key, tensor in _hub_tensors(name, first, part):
            if size + tensor.nbytes > FILE_BYTES and waiting:
                flush()
                size = 0
            waiting[key], where[key] = tensor.to("cpu", copy=True).contiguous(), len(files)
            size += tensor.nbytes
            total += tensor.nbytes
    flush()
    names = [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    names = names if len(files) > 1 else ["model.safetensors"]
    for path, name in zip(files, names, strict=True):
        path.rename(folder / name)
    if len(files) > 1:
        weight_map = {key: names[file] for key, file in sorted(where.items())}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        text = json.dumps(index, indent=2) + "\n"
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    _write_config(model, folder)


def _hub_tensors(name: str, first: int, part: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """A part as the hub stores it."""
    fused = matrices_of_experts(name)
    if fused is None:
        yield name, part
        return
    path, matrices = fused
    for i, weights in enumerate(part.unbind()):
        for matrix, weight in zip(matrices, weights.chunk(len(matrices)), strict=True):
            yield stored_name(path, first + i, matrix), weight


def _write_config(model: nn.Module, folder: Path) -> None:
    """What `save_pretrained` writes beside the weights."""
    config = copy.deepcopy(model.config)
    config.dtype = str(model.dtype).removeprefix("torch.")
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    add_v4_keys(folder)
