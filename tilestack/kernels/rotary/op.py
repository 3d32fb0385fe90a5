"""Rotary position embedding of the first columns of each head, out of place or in place: the contract.

    out[.., a] = x[.., a] * cos[p] - x[.., b] * sin[p]
    out[.., b] = x[.., b] * cos[p] + x[.., a] * sin[p]         (conjugate: with -sin)

for the pairs of columns (a, b): (j, j + R / 2), or if interleaved (2j, 2j + 1); p is the token's position and j the
column of cos and sin; the columns behind R are copied. Float32 inside. The gradient of x is the gradient of out,
rotated with conjugate=True, so this op has no backward of its own.

Source: Su et al., "RoFormer" (2021), section 3.2.2, interleaved; the halves: GPT-NeoX.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tilestack.kernels import checks
from tilestack.kernels.dispatch import Op, portable, reference
from tilestack.kernels.registration import InPlaceContract


@dataclass(frozen=True)
class RotaryParams:
    """seqlen_offset: of all sequences, where there is no tensor of offsets. max_seqlen: 0 for dense input."""

    seqlen_offset: int
    max_seqlen: int
    interleaved: bool
    conjugate: bool


CONTRACT = InPlaceContract(
    "rotary", ("out", "x?", "cos", "sin", "cu_seqlens?", "seqlen_offsets?"), ("out",), RotaryParams
)
OP = Op(CONTRACT, (portable("rotary"), reference("rotary")))


@torch.no_grad()
def rotary(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    seqlen_offsets: int | torch.Tensor = 0,
    cu_seqlens: torch.Tensor | None = None,
    max_seqlen: int | None = None,
    interleaved: bool = False,
    conjugate: bool = False,
    inplace: bool = False,
    implementation: str | None = None,
) -> torch.Tensor:
    """Rotate the first R columns of x by the angles of its positions. Nothing is recorded by autograd.

    x: dense [B, S, H, D] or packed [T, H, D], floating point, any strides but 1 for the last if it is in place.
    cos, sin: [positions, R / 2], the dtype of x; R is even and at most D.
    seqlen_offsets: the position of each sequence's first token: one number, or int32 or int64 [B] on the device of x,
        which is not read on the host. Tokens whose position cos and sin do not have are copied.
    cu_seqlens, max_seqlen: packed input only: int32 [B + 1], and the length that no sequence exceeds. Out of place,
        rows of no sequence are 0.
    conjugate: rotate the other way.
    inplace: write into x, and return it.
    implementation: "tilestack-triton" or "reference"; None chooses.

    Returns a tensor like x, contiguous, or x itself. Raises ValueError for wrong shapes, dtypes, devices or numbers.
    """
    _check_tensors(x, cos, sin, inplace)
    _check_packing(x, cu_seqlens, max_seqlen)
    length = x.shape[-3] if max_seqlen is None else max_seqlen
    offsets, offset = _check_offsets(x, cos, seqlen_offsets, cu_seqlens, length)
    if inplace:
        out = x
    elif cu_seqlens is None:
        out = x.new_empty(x.shape)
    else:
        out = x.new_zeros(x.shape)
    params = RotaryParams(offset, max_seqlen or 0, interleaved, conjugate)
    OP((out, None if inplace else x, cos, sin, cu_seqlens, offsets), params, implementation)
    return out


def _check_tensors(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, inplace: bool) -> None:
    checks.floating("rotary", x=x)
    checks.rank("rotary", "x", x, (3, 4), "[B, S, H, D], or packed [T, H, D]")
    checks.rank("rotary", "cos", cos, (2,), "[positions, R / 2]")
    checks.shape("rotary", "sin", sin, tuple(cos.shape), "the shape of cos")
    checks.same_dtype("rotary", x=x, cos=cos, sin=sin)
    checks.same_device("rotary", x=x, cos=cos, sin=sin)
    if 2 * cos.shape[1] > x.shape[-1]:
        raise ValueError(f"rotary: cos must have at most D / 2 columns, D = {x.shape[-1]}, got {cos.shape[1]}")
    if inplace and x.stride(-1) != 1 and x.shape[-1] > 1:
        raise ValueError(f"rotary: the last stride of x must be 1 to rotate in place, got {x.stride(-1)}")


def _check_packing(x: torch.Tensor, cu_seqlens: torch.Tensor | None, max_seqlen: int | None) -> None:
    packed = x.dim() == 3
    if packed != (cu_seqlens is not None) or packed != (max_seqlen is not None):
        raise ValueError(
            f"rotary: cu_seqlens and max_seqlen belong to packed x [T, H, D], and it to them; x is {list(x.shape)}"
        )
    if packed:
        checks.dtype("rotary", "cu_seqlens", cu_seqlens, torch.int32)
        checks.rank("rotary", "cu_seqlens", cu_seqlens, (1,), "[B + 1]")
        checks.at_least("rotary", "the length of cu_seqlens", cu_seqlens.numel(), 1)
        checks.same_device("rotary", x=x, cu_seqlens=cu_seqlens)
        checks.at_least("rotary", "max_seqlen", max_seqlen, 0)


def _check_offsets(
    x: torch.Tensor, cos: torch.Tensor, seqlen_offsets: int | torch.Tensor, cu_seqlens: torch.Tensor | None, length: int
) -> tuple[torch.Tensor | None, int]:
    if isinstance(seqlen_offsets, torch.Tensor):
        sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
        if seqlen_offsets.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"rotary: seqlen_offsets must be int32 or int64, got {seqlen_offsets.dtype}")
        checks.shape("rotary", "seqlen_offsets", seqlen_offsets, (sequences,), "one for each sequence")
        checks.same_device("rotary", x=x, seqlen_offsets=seqlen_offsets)
        return seqlen_offsets, 0
    checks.at_least("rotary", "seqlen_offsets", seqlen_offsets, 0)
    checks.at_least("rotary", "the positions of cos", cos.shape[0], length + seqlen_offsets)
    return None, seqlen_offsets
