"""Rotary position embedding while rows are loaded: device functions for every kernel that reads or writes a cache.

The partner of a column is loaded a second time (from L1) instead of being exchanged between threads, so that any
rotary dimension and both pairings are the same code.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_rotated(
    row_ptrs, row_mask, positions, cos_ptr, sin_ptr, table_rows, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    ROTARY_DIM: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Rows at `row_ptrs` [BLOCK] as [BLOCK, BLOCK_D] in their dtype, the first ROTARY_DIM columns rotated.

    ROTARY_DIM 0: as they are. Positions past the table take its last row. 0 outside of the mask and of HEAD_DIM.
    """
    offs_d = tl.arange(0, BLOCK_D)
    mask = row_mask[:, None] & (offs_d < HEAD_DIM)[None, :]
    x = tl.load(row_ptrs[:, None] + offs_d[None, :], mask=mask, other=0.0)
    if ROTARY_DIM > 0:
        HALF: tl.constexpr = ROTARY_DIM // 2
        if INTERLEAVED:
            is_first = offs_d % 2 == 0
            column = offs_d // 2
            partner = tl.where(is_first, offs_d + 1, offs_d - 1)
        else:
            is_first = offs_d < HALF
            column = tl.where(is_first, offs_d, offs_d - HALF)
            partner = tl.where(is_first, offs_d + HALF, offs_d - HALF)
        turns = row_mask[:, None] & (offs_d < ROTARY_DIM)[None, :]
        other = tl.load(row_ptrs[:, None] + partner[None, :], mask=turns, other=0.0).to(tl.float32)
        row = tl.minimum(tl.maximum(positions, 0), table_rows - 1)
        table = tl.cast(row, tl.int64)[:, None] * HALF + column[None, :]
        cos = tl.load(cos_ptr + table, mask=turns, other=1.0).to(tl.float32)
        sin = tl.load(sin_ptr + table, mask=turns, other=0.0).to(tl.float32)
        turned = x.to(tl.float32) * cos + tl.where(is_first[None, :], -other, other) * sin
        x = tl.where(turns, turned.to(x.dtype), x)
    return x
