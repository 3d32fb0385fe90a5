"""flash_attn.ops.activations, as far as other projects import it, in torch and `tilestack.kernels.swiglu`."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812  (torch's own habit)

from tilestack.kernels import swiglu as _swiglu

__all__ = ["bias_gelu_impl", "fast_gelu_impl", "sqrelu_bwd", "sqrelu_fwd", "swiglu"]


def swiglu(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """silu(x) * y."""
    return _swiglu(x, y)


def fast_gelu_impl(x: torch.Tensor) -> torch.Tensor:
    """gelu, with the hyperbolic tangent."""
    return F.gelu(x, approximate="tanh")


def bias_gelu_impl(input: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """gelu(input + bias), with the hyperbolic tangent."""
    return fast_gelu_impl(input + bias)


def sqrelu_fwd(x: torch.Tensor) -> torch.Tensor:
    """relu(x)^2."""
    return F.relu(x).square()


def sqrelu_bwd(g: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The gradient of sqrelu_fwd in x, g that of its result."""
    return 2.0 * g * F.relu(x)
