"""swiglu in plain torch: the definition."""

from __future__ import annotations

import torch

from tilestack.kernels.dispatch import Call
from tilestack.kernels.reference_autograd import gradients

AUXILIARY = ()
SAVED = ("gate", "up")


def refuses(call: Call) -> str | None:
    return None


def compute(gate: torch.Tensor, up: torch.Tensor, params) -> tuple[torch.Tensor]:
    wide = torch.promote_types(gate.dtype, torch.float32)
    out = torch.nn.functional.silu(gate.to(wide)) * up.to(wide)
    return (out.to(gate.dtype).contiguous(),)


def forward(gate, up, params):
    return compute(gate, up, params)


def backward(dout, gate, up, *, needs, params):
    return gradients(compute, {"gate": gate, "up": up}, (dout,), needs, params)
