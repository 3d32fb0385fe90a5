"""Small helpers around launching Triton kernels."""

from __future__ import annotations

import contextlib
import functools

import torch

_NOTHING_TO_DO = contextlib.nullcontext()


def on_device(tensor: torch.Tensor) -> contextlib.AbstractContextManager:
    """Make the tensor's GPU the current one while a kernel is launched: Triton launches on the current device."""
    is_elsewhere = tensor.is_cuda and tensor.device.index != torch.cuda.current_device()
    return torch.cuda.device(tensor.device) if is_elsewhere else _NOTHING_TO_DO


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
