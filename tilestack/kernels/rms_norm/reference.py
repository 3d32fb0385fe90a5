"""rms_norm in plain torch: the definition."""

from __future__ import annotations

import torch

from tilestack.kernels.dispatch import Call
from tilestack.kernels.reference_autograd import gradients

AUXILIARY = ()
SAVED = ("x", "weight", "residual")


def refuses(call: Call) -> str | None:
    return None


def compute(x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor | None, params) -> tuple[torch.Tensor, ...]:
    summed = x if residual is None else x + residual
    wide = summed.to(torch.promote_types(x.dtype, torch.float32))
    normalised = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + params.eps)
    out = weight * normalised.to(x.dtype)
    return out, summed if residual is not None else x.new_empty(0)


def forward(x, weight, residual, params):
    return compute(x, weight, residual, params)


def backward(dout, dresidual_out, x, weight, residual, *, needs, params):
    named = {"x": x, "weight": weight, "residual": residual}
    return gradients(compute, named, (dout, dresidual_out), needs, params)
