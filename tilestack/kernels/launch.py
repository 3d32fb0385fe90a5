"""Small helpers around launching Triton kernels."""

from __future__ import annotations

import contextlib
import functools

import torch
import triton


def on_device(tensor: torch.Tensor) -> contextlib.AbstractContextManager:
    """Make the tensor's GPU the current one while a kernel is launched: Triton launches on the current device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


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
    return triton.cdiv(a, b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n."""
    return triton.next_power_of_2(n)
