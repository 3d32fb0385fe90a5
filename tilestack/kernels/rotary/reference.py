"""rotary in plain torch: the definition. Positions of packed input are read on the host."""

from __future__ import annotations

import torch

from tilestack.kernels.dispatch import Call


def refuses(call: Call) -> str | None:
    return None


def update(out, x, cos, sin, cu_seqlens, seqlen_offsets, params) -> None:
    x = out if x is None else x
    offsets = seqlen_offsets
    if cu_seqlens is None:
        if offsets is None:
            offsets = torch.full((x.shape[0],), params.seqlen_offset, device=x.device)
        positions = offsets[:, None] + torch.arange(x.shape[1], device=x.device)
        _rotate(out, x, *_rows(cos, sin, positions, params), params.interleaved)
        return
    starts = cu_seqlens.tolist()
    offsets = [params.seqlen_offset] * (len(starts) - 1) if offsets is None else offsets.tolist()
    for start, end, offset in zip(starts[:-1], starts[1:], offsets, strict=True):
        positions = torch.arange(offset, offset + end - start, device=x.device)
        _rotate(out[start:end], x[start:end], *_rows(cos, sin, positions, params), params.interleaved)


def _rows(cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor, params) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of positions: [..., 1, R / 2], float32 or wider."""
    wide = torch.promote_types(cos.dtype, torch.float32)
    beyond = (positions >= cos.shape[0])[..., None]
    rows = positions.clamp_max(cos.shape[0] - 1)
    cos = cos[rows].to(wide).masked_fill(beyond, 1)
    sin = sin[rows].to(wide).masked_fill(beyond, 0)
    return cos.unsqueeze(-2), (-sin if params.conjugate else sin).unsqueeze(-2)


def _rotate(out: torch.Tensor, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> None:
    half = cos.shape[-1]
    first, second = (
        (slice(0, 2 * half, 2), slice(1, 2 * half, 2)) if interleaved else (slice(half), slice(half, 2 * half))
    )
    a, b = x[..., first].to(cos.dtype), x[..., second].to(cos.dtype)
    rotated = a * cos - b * sin, b * cos + a * sin  # both before a write: out may be x
    out[..., first], out[..., second] = rotated
    out[..., 2 * half :] = x[..., 2 * half :]
