"""rms_norm in plain torch: the definition."""

from __future__ import annotations

import torch

from tilestack.kernels.dispatch import Call
from tilestack.kernels.reference_autograd import gradients

AUXILIARY = ()
SAVED = ("x", "weight", "residual")


def refuses(call: Call) -> str | None:
    return None


def normalise(x: torch.Tensor, weight: torch.Tensor, params) -> tuple[torch.Tensor]:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normalised = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + params.eps)
    return (weight * normalised.to(x.dtype),)


def forward(x, weight, residual, params):
    summed = x if residual is None else x + residual
    return *normalise(summed, weight, params), summed if residual is not None else x.new_empty(0)


def backward(dout, dresidual_out, x, weight, residual, *, needs, params):
    summed = x if residual is None else x + residual
    dsummed, dweight = gradients(normalise, {"x": summed, "weight": weight}, (dout,), ("x", "weight"), params)
    if dresidual_out is not None:  # last, as autograd adds it where sum and norm are apart: the bits are the same
        dsummed = dsummed + dresidual_out
    found = {"x": dsummed, "weight": dweight, "residual": dsummed}
    return tuple(found[name] for name in needs)
