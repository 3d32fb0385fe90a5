"""The gated linear unit's elementwise part: the contract.

    out = silu(gate) * up,  silu(x) = x * sigmoid(x)

Source: Shazeer, "GLU Variants Improve Transformer" (2020), eq. 6, without the projections. Computed in float32 and
rounded once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tilestack.kernels import checks
from tilestack.kernels.dispatch import Op, portable, reference
from tilestack.kernels.registration import Contract


@dataclass(frozen=True)
class SwiGLUParams:
    """swiglu has no argument but its tensors."""


def _fake(gate: torch.Tensor, up: torch.Tensor, params: SwiGLUParams) -> tuple[torch.Tensor]:
    return (gate.new_empty(gate.shape),)


CONTRACT = Contract("swiglu", ("gate", "up"), ("out",), SwiGLUParams, _fake)
OP = Op(CONTRACT, (portable("swiglu"), reference("swiglu")))


def swiglu(gate: torch.Tensor, up: torch.Tensor, *, implementation: str | None = None) -> torch.Tensor:
    """silu(gate) * up, element by element.

    gate: [..., I], floating point, any strides (half of a fused projection's output is read in place).
    up: the shape, dtype and device of gate.
    implementation: "tilestack-triton" or "reference"; None chooses.

    Returns `out` [..., I], contiguous, the dtype of gate. Differentiable in gate and up.
    Raises ValueError for wrong shapes, dtypes or devices.
    """
    checks.floating("swiglu", gate=gate)
    checks.same_dtype("swiglu", gate=gate, up=up)
    checks.same_device("swiglu", gate=gate, up=up)
    checks.shape("swiglu", "up", up, tuple(gate.shape), "the shape of gate")
    (out,) = OP((gate, up), SwiGLUParams(), implementation)
    return out
