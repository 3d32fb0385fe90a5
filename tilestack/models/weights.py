"""Weights that are not read yet: a model without memory, and a source that fills any part of any parameter.

    model, weights = pretrained(path, torch.bfloat16)     parameters on the meta device; nothing but headers was read
    materialise(model, weights, device)                    one parameter after the other, straight on the device

An engine whose rank holds a part of the model (some experts, some elements) asks the source for that part alone: so no
rank needs the whole model in memory to load it, nor two copies of what it keeps. Elements are numbered in the flattened
parameter, as in a checkpoint's pieces.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, GenerationConfig, Qwen3MoeConfig

from tilestack.models.hub_layout import matrices_of_experts, stored_name
from tilestack.models.kernel_choice import KernelChoice
from tilestack.models.loading import check_folder, check_loaded, shards
from tilestack.models.qwen3_moe import Qwen3MoeForCausalLM
from tilestack.models.rotary import restore_rotary_frequencies

BLOCK = 1 << 18  # elements that one generator draws
FLOATS = ("F64", "F32", "F16", "BF16")  # safetensors' names of what a weight may be stored as


class Weights(Protocol):
    """Where a model's weights come from."""

    def fill(self, name: str, start: int, target: torch.Tensor) -> None:
        """Write elements [start, start + n) of the flattened parameter `name` into target [n], of any float dtype."""


def pretrained(
    path: str | Path,
    dtype: torch.dtype,
    config: Qwen3MoeConfig | None = None,
    kernels: KernelChoice | Mapping[str, str] | None = None,
) -> tuple[Qwen3MoeForCausalLM, Weights]:
    """A model on the meta device, and a Hugging Face checkpoint in the hub's layout to fill it from.

    path: a folder, or the name of a checkpoint on the hub, which is downloaded. config: that of the checkpoint, if it
        is to differ. Weights are converted to `dtype` as they are read.

    Raises ValueError for a checkpoint that is of another architecture, lacks parameters, or has a broken shard.
    """
    folder = _local(path)
    check_folder(folder)
    model = outline(config or AutoConfig.from_pretrained(folder, trust_remote_code=False), dtype, kernels)
    if (folder / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model, _Stored(folder, model)


def drawn(
    config: Qwen3MoeConfig,
    dtype: torch.dtype,
    seed: int,
    kernels: KernelChoice | Mapping[str, str] | None = None,
) -> tuple[Qwen3MoeForCausalLM, Weights]:
    """A new model on the meta device, and its first weights, distributed as transformers draws them.

    Every element is a function of the seed and its place alone: the same for any number of ranks and on any device.
    """
    model = outline(config, dtype, kernels)
    return model, _Drawn(model, seed)


def outline(
    config: Qwen3MoeConfig, dtype: torch.dtype, kernels: KernelChoice | Mapping[str, str] | None = None
) -> Qwen3MoeForCausalLM:
    """The model on the meta device: shapes and dtypes without memory."""
    with torch.device("meta"):
        return Qwen3MoeForCausalLM._from_config(config, dtype=dtype, kernels=kernels)


def is_outline(model: nn.Module) -> bool:
    """Whether the model's parameters have no memory yet."""
    return next(model.parameters()).is_meta


@torch.no_grad()
def materialise(
    model: nn.Module, weights: Weights, device: torch.device, begins: Mapping[str, int] | None = None
) -> None:
    """Give every parameter of an outline its memory on `device`, and its weights.

    begins: of a parameter that is a part of a larger one: the number of its first element there.
    """
    for name, parameter in list(model.named_parameters()):
        filled = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
        weights.fill(name, (begins or {}).get(name, 0), filled.view(-1))
        replace_data(model, parameter, filled)
    restore_rotary_frequencies(model, device)


def replace_data(model: nn.Module, parameter: nn.Parameter, data: torch.Tensor) -> nn.Parameter:
    """Put a parameter with this data in the place of `parameter`, wherever the model has it (tied weights: twice).

    A parameter on the meta device cannot be given memory. What was noted on it is noted on the new one.
    """
    new = nn.Parameter(data, requires_grad=parameter.requires_grad)
    new.__dict__.update(parameter.__dict__)
    for module in model.modules():
        for name, each in module._parameters.items():
            if each is parameter:
                module._parameters[name] = new
    return new


@dataclass(frozen=True)
class _Segment:
    """A stored matrix or vector, which is elements [start, start + numel) of a parameter."""

    start: int
    key: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()


class _Stored:
    """The safetensors files of a checkpoint in the hub's layout: one matrix for each expert; or fused, as in memory."""

    def __init__(self, folder: Path, model: Qwen3MoeForCausalLM):
        self._files = {path: safe_open(path, framework="pt") for path in shards(folder)}
        self._where = {key: file for file in self._files.values() for key in file.keys()}  # noqa: SIM118
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        self._segments = {name: list(self._stored_as(name, shape)) for name, shape in shapes.items()}
        lacking = [each.key for segments in self._segments.values() for each in segments if each.key not in self._where]
        check_loaded(folder, {"missing_keys": lacking})
        for each in (each for segments in self._segments.values() for each in segments):
            found = self._where[each.key].get_slice(each.key)
            if tuple(found.get_shape()) != each.shape or found.get_dtype() not in FLOATS:
                raise ValueError(
                    f"{folder}: {each.key} must be {list(each.shape)} in one of {', '.join(FLOATS)}, got "
                    f"{list(found.get_shape())} in {found.get_dtype()}: of another model, or quantised"
                )

    def _stored_as(self, name: str, shape: tuple[int, ...]) -> Iterator[_Segment]:
        fused = matrices_of_experts(name)
        if fused is None or name in self._where:
            yield _Segment(0, name, shape)
            return
        path, matrices = fused
        rows, columns = shape[1] // len(matrices), shape[2]
        for i in range(shape[0] * len(matrices)):
            expert, matrix = divmod(i, len(matrices))
            yield _Segment(i * rows * columns, stored_name(path, expert, matrices[matrix]), (rows, columns))

    def fill(self, name: str, start: int, target: torch.Tensor) -> None:
        end = start + target.numel()
        for each in self._segments[name]:
            low, high = max(start, each.start), min(end, each.start + each.numel)
            if low < high:
                part = self._read(each, low - each.start, high - each.start)
                target[low - start : high - start].copy_(part)

    def _read(self, segment: _Segment, low: int, high: int) -> torch.Tensor:
        """Elements [low, high) of what is stored: whole rows are read, and what is too much is cut off."""
        stored = self._where[segment.key].get_slice(segment.key)
        row = segment.numel // segment.shape[0]
        first, last = low // row, -(-high // row)
        return stored[first:last].reshape(-1)[low - first * row : high - first * row]


class _Drawn:
    """Normal numbers of the configuration's initializer_range; norms are 1, biases and the padding's embedding 0.

    A block of BLOCK elements is drawn by a generator of its own, whose seed is the block's number in the model: whoever
    needs a part of it draws the block.
    """

    def __init__(self, model: Qwen3MoeForCausalLM, seed: int):
        self._seed, self._std = seed, model.config.initializer_range
        self._first_block, self._constants, self._zeros = {}, {}, {}
        blocks = 0
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                self._constants[name] = 0.0 if name.endswith(".bias") else 1.0
            self._first_block[name] = blocks
            blocks += -(-parameter.numel() // BLOCK)
        for name, module in model.named_modules():
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                width = module.embedding_dim
                self._zeros[f"{name}.weight"] = (module.padding_idx * width, (module.padding_idx + 1) * width)

    def fill(self, name: str, start: int, target: torch.Tensor) -> None:
        if name in self._constants:
            target.fill_(self._constants[name])
            return
        end = start + target.numel()

        def draw(block: int) -> None:
            generator = torch.Generator().manual_seed(
                (self._seed * 0x9E3779B1 + self._first_block[name] + block) % 2**32
            )
            numbers = torch.empty(BLOCK).normal_(std=self._std, generator=generator)
            low, high = max(start, block * BLOCK), min(end, (block + 1) * BLOCK)
            if low < high:
                target[low - start : high - start].copy_(numbers[low - block * BLOCK : high - block * BLOCK])

        with ThreadPoolExecutor(_threads()) as pool:  # drawing leaves Python's lock alone
            list(pool.map(draw, range(start // BLOCK, -(-end // BLOCK))))
        low, high = self._zeros.get(name, (0, 0))
        target[max(low - start, 0) : max(high - start, 0)].zero_()


def _threads() -> int:
    """This process's share of the machine's cores."""
    return max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def _local(path: str | Path) -> Path:
    """The folder of a checkpoint; one of the hub is downloaded."""
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(str(path), allow_patterns=["*.safetensors", "*.json"]))
