"""Argument checks of the public functions: one clear error, before anything is launched.

Every message names the op, the argument, the rule and the value.
"""

from __future__ import annotations

import torch


def tensors(op: str, **values: object) -> None:
    """Every value is a tensor."""
    for name, value in values.items():
        if not isinstance(value, torch.Tensor):
            raise ValueError(f"{op}: {name} must be a tensor, got {type(value).__name__}")


def floating(op: str, **tensors: torch.Tensor | None) -> None:
    """Every tensor given holds floating-point numbers of 16 bits or more."""
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_floating_point():
            raise ValueError(f"{op}: {name} must be floating point, got {tensor.dtype}")
        if tensor is not None and tensor.dtype.itemsize < 2:
            raise ValueError(f"{op}: {name} must have 16 bits or more a number, got {tensor.dtype}; convert it first")


def same_dtype(op: str, **tensors: torch.Tensor | None) -> None:
    """Every tensor given has the dtype of the first."""
    _same(op, "dtype", tensors)


def same_device(op: str, **tensors: torch.Tensor | None) -> None:
    """Every tensor given lies on the device of the first."""
    _same(op, "device", tensors)


def _same(op: str, attribute: str, tensors: dict[str, torch.Tensor | None]) -> None:
    given = [(name, getattr(tensor, attribute)) for name, tensor in tensors.items() if tensor is not None]
    first_name, first = given[0]
    for name, value in given[1:]:
        if value != first:
            raise ValueError(f"{op}: {name} must have the {attribute} of {first_name} ({first}), got {value}")


def dtype(op: str, name: str, tensor: torch.Tensor, expected: torch.dtype) -> None:
    """The tensor has exactly this dtype."""
    if tensor.dtype != expected:
        raise ValueError(f"{op}: {name} must be {expected}, got {tensor.dtype}; convert it with .to({expected})")


def shape(op: str, name: str, tensor: torch.Tensor, expected: tuple[int, ...], meaning: str) -> None:
    """The tensor has exactly this shape; `meaning` says in words what that is."""
    if tuple(tensor.shape) != tuple(expected):
        raise ValueError(f"{op}: {name} must be {list(expected)} ({meaning}), got {list(tensor.shape)}")


def rank(op: str, name: str, tensor: torch.Tensor, ranks: tuple[int, ...], meaning: str) -> None:
    """The tensor has one of these numbers of dimensions."""
    if tensor.dim() not in ranks:
        raise ValueError(f"{op}: {name} must be {meaning}, got {tensor.dim()} dimensions: {list(tensor.shape)}")


def at_least(op: str, name: str, value: float, low: float) -> None:
    """The number is `low` or more."""
    if value < low:
        raise ValueError(f"{op}: {name} must be at least {low}, got {value}")
