"""Root-mean-square normalisation, with the residual addition in front of it: the contract.

    residual_out = x + residual
    out = residual_out / sqrt(mean(residual_out^2) + eps) * weight

Source: Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019), eq. 4. Mean and quotient are float32; the
product with weight is rounded twice, as in transformers (first to x's dtype, then the product), so that checkpoints
give the same numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tilestack.kernels import checks
from tilestack.kernels.dispatch import Op, portable, reference
from tilestack.kernels.registration import Contract


@dataclass(frozen=True)
class RMSNormParams:
    eps: float


def _fake(x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor | None, params: RMSNormParams) -> tuple:
    return x.new_empty(x.shape), x.new_empty(x.shape if residual is not None else (0,))


CONTRACT = Contract(
    "rms_norm",
    ("x", "weight", "residual?"),
    ("out", "residual_out"),
    RMSNormParams,
    _fake,
    gradient_like=(("residual", "x"),),
    shared_gradients=(("residual", "x"),),
)
OP = Op(CONTRACT, (portable("rms_norm"), reference("rms_norm")))


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    residual: torch.Tensor | None = None,
    eps: float = 1e-6,
    implementation: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Normalise the last dimension of `x`, after adding `residual` if there is one.

    x: [..., H], floating point, any strides.
    weight: [H], the dtype of x.
    residual: like x, or None.
    implementation: "tilestack-triton" or "reference"; None chooses.

    Returns `out` like x, or with a residual `(out, residual_out)`. Differentiable in x, weight and residual.
    Raises ValueError for wrong shapes, dtypes or devices.
    """
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"rms_norm: x must be [..., H], H at least 1, got {list(x.shape)}")
    checks.at_least("rms_norm", "eps", eps, 0)
    checks.floating("rms_norm", x=x)
    checks.same_dtype("rms_norm", x=x, weight=weight, residual=residual)
    checks.same_device("rms_norm", x=x, weight=weight, residual=residual)
    checks.shape("rms_norm", "weight", weight, (x.shape[-1],), "[H], H the last dimension of x")
    if residual is not None:
        checks.shape("rms_norm", "residual", residual, tuple(x.shape), "the shape of x")
    out, residual_out = OP((x, weight, residual), RMSNormParams(eps), implementation)
    return out if residual is None else (out, residual_out)
