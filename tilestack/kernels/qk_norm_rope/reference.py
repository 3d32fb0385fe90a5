"""qk_norm_rope in plain torch: the definition, in the order of transformers' operations."""

from __future__ import annotations

import torch

from tilestack.kernels.dispatch import Call
from tilestack.kernels.reference_autograd import gradients

AUXILIARY = ()
SAVED = ("q", "k", "q_weight", "k_weight", "cos", "sin")


def refuses(call: Call) -> str | None:
    return None


def compute(q, k, q_weight, k_weight, cos, sin, params) -> tuple[torch.Tensor, torch.Tensor]:
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)  # the same for every head
    return _norm_rope(q, q_weight, cos, sin, params.eps), _norm_rope(k, k_weight, cos, sin, params.eps)


def _norm_rope(x: torch.Tensor, weight: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normalised = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    n = weight * normalised.to(x.dtype)
    first, second = n.chunk(2, dim=-1)
    rotated = torch.cat((-second, first), dim=-1)
    return (n * cos + rotated * sin).to(x.dtype).contiguous()


def forward(q, k, q_weight, k_weight, cos, sin, params):
    return compute(q, k, q_weight, k_weight, cos, sin, params)


def backward(dq_out, dk_out, q, k, q_weight, k_weight, cos, sin, *, needs, params):
    named = {"q": q, "k": k, "q_weight": q_weight, "k_weight": k_weight, "cos": cos, "sin": sin}
    return gradients(compute, named, (dq_out, dk_out), needs, params)
