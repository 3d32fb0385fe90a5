"""Small helpers around launching Triton kernels."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Hashable
from typing import Any

import torch

_NOTHING_TO_DO = contextlib.nullcontext()
_COMPILED: dict[tuple, tuple[Any, tuple]] = {}
_MOST_COMPILED = 4096  # packed batches have new shapes at each step


def on_device(tensor: torch.Tensor) -> contextlib.AbstractContextManager:
    """Make the tensor's GPU the current one while a kernel is launched: Triton launches on the current device."""
    is_elsewhere = tensor.is_cuda and tensor.device.index != torch.cuda.current_device()
    return torch.cuda.device(tensor.device) if is_elsewhere else _NOTHING_TO_DO


def again(key: Hashable, kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """kernel[grid](*args, **options), which from the second launch with this key on does not look for what to run.

    Triton looks at each argument to find the compiled kernel, for tens of microseconds. key: all that decides which it
    is: the device, dtypes, constants, integers, and which tensors begin at multiples of 16 bytes.
    """
    place = (kernel, key)
    found = _COMPILED.get(place)
    if found is not None:
        compiled, constants = found
        compiled[(*grid, 1, 1)[:3]](*args, *constants)
        return
    compiled = kernel[grid](*args, **options)
    if compiled is not None:  # the interpreter has none
        if len(_COMPILED) >= _MOST_COMPILED:
            _COMPILED.clear()
        _COMPILED[place] = compiled, tuple([options[name] for name in kernel.arg_names[len(args) :]])


def multiprocessors(tensor: torch.Tensor) -> int:
    """Multiprocessors of the tensor's GPU; 4 in the interpreter, so that persistent loops run more than once."""
    return _multiprocessors(tensor.device.index) if tensor.is_cuda else 4


@functools.cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def rows(tensor: torch.Tensor) -> torch.Tensor:
    """View (or, where strides forbid it, copy) [..., H] as [rows, H] whose last dimension is contiguous."""
    flat = tensor.reshape(-1, tensor.shape[-1])
    return flat if flat.stride(-1) == 1 or flat.shape[-1] == 1 else flat.contiguous()


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)  # triton.cdiv is for kernels, and takes ten microseconds


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length() if n > 0 else 0
