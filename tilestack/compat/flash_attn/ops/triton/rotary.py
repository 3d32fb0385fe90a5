"""flash_attn.ops.triton.rotary."""

from __future__ import annotations

from typing import Any

import torch

from tilestack.kernels import rotary

__all__ = ["apply_rotary"]


def __getattr__(name: str) -> Any:
    """rotary_kernel, the JIT function, is looked up when asked for: the rest of the module works without Triton."""
    if name == "rotary_kernel":
        from tilestack.kernels.rotary.triton_portable import rotary_kernel

        return rotary_kernel
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def apply_rotary(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    seqlen_offsets: int | torch.Tensor = 0,
    cu_seqlens: torch.Tensor | None = None,
    max_seqlen: int | None = None,
    interleaved=False,
    inplace=False,
    conjugate=False,
) -> torch.Tensor:
    """Rotate the first columns of each head: `tilestack.kernels.rotary`. No gradient; see layers/rotary.py.

    x: [B, S, H, D], or [total, H, D] with cu_seqlens and max_seqlen. cos, sin: [positions, R / 2], the dtype of x.
    """
    return rotary(
        x, cos, sin, seqlen_offsets=seqlen_offsets, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen,
        interleaved=interleaved, conjugate=conjugate, inplace=inplace,
    )  # fmt: skip
