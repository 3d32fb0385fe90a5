"""kv_cache_append in Triton: one pass over the new rows.

A row is one head of one new token. A program owns a block of rows of one sequence; where they land is looked up on the
device, in cache_seqlens and block_table.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tilestack.kernels import launch
from tilestack.kernels.dispatch import Call
from tilestack.kernels.kv_cache_append.cache import capacity
from tilestack.kernels.kv_cache_append.configs import NUM_WARPS, block_rows
from tilestack.kernels.kv_cache_append.triton_rotary import load_rotated


def refuses(call: Call) -> str | None:
    if call.dtype("k_cache") == torch.float64:
        return "has no float64 path"
    for name in ("k_cache", "v_cache"):
        spec = call.tensors[name]
        if spec.stride[-1] != 1 and spec.shape[-1] != 1:
            return f"writes heads of adjacent numbers, {name} has strides {list(spec.stride)}"
    return None


@triton.jit(do_not_specialize=["n_new", "room", "n_blocks", "table_rows"])
def kv_cache_append_kernel(
    k_cache_ptr, v_cache_ptr, k_ptr, v_ptr, cache_seqlens_ptr, block_table_ptr, cache_batch_idx_ptr, cos_ptr, sin_ptr,
    stride_kcb, stride_kcs, stride_kch, stride_vcb, stride_vcs, stride_vch,
    stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh, stride_table,
    n_new, room, n_blocks, table_rows,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, PAGE: tl.constexpr,
    ROTARY_DIM: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    sequence = tl.cast(tl.program_id(0) // n_blocks, tl.int64)
    rows = tl.program_id(0) % n_blocks * BLOCK_R + tl.arange(0, BLOCK_R)
    token = rows // HEADS
    head = tl.cast(rows % HEADS, tl.int64)
    position = tl.load(cache_seqlens_ptr + sequence) + token
    row_mask = (token < n_new) & (position >= 0) & (position < room)
    if PAGE > 0:
        page = tl.load(block_table_ptr + sequence * stride_table + position // PAGE, mask=row_mask, other=0)
        batch = tl.cast(page, tl.int64)
        place = tl.cast(position % PAGE, tl.int64)
    else:
        index = sequence if cache_batch_idx_ptr is None else tl.load(cache_batch_idx_ptr + sequence)
        batch = tl.zeros([BLOCK_R], tl.int64) + index
        place = tl.cast(position, tl.int64)
    source = tl.cast(token, tl.int64)
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    mask = row_mask[:, None] & (offs_d < HEAD_DIM)

    k = load_rotated(
        k_ptr + sequence * stride_kb + source * stride_ks + head * stride_kh, row_mask, position, cos_ptr, sin_ptr,
        table_rows, HEAD_DIM, BLOCK_D, ROTARY_DIM, INTERLEAVED,
    )  # fmt: skip
    v_rows = v_ptr + sequence * stride_vb + source * stride_vs + head * stride_vh
    v = tl.load(v_rows[:, None] + offs_d, mask=mask)
    k_places = k_cache_ptr + batch * stride_kcb + place * stride_kcs + head * stride_kch
    v_places = v_cache_ptr + batch * stride_vcb + place * stride_vcs + head * stride_vch
    tl.store(k_places[:, None] + offs_d, k, mask=mask)
    tl.store(v_places[:, None] + offs_d, v, mask=mask)


def update(k_cache, v_cache, k, v, cache_seqlens, block_table, cache_batch_idx, rotary_cos, rotary_sin, params) -> None:
    batch, n_new, heads, head_dim = k.shape
    block_d = max(16, launch.next_power_of_2(head_dim))
    rows = block_rows(block_d)
    n_blocks = launch.cdiv(n_new * heads, rows)
    if batch * n_blocks == 0:
        return
    k, v = (each if each.stride(-1) == 1 else each.contiguous() for each in (k, v))
    rotates = rotary_cos is not None
    cos, sin = (rotary_cos.contiguous(), rotary_sin.contiguous()) if rotates else (None, None)
    with launch.on_device(k):
        launch.run(
            kv_cache_append_kernel, (batch * n_blocks,),
            k_cache, v_cache, k, v, cache_seqlens.contiguous(),
            None if block_table is None else block_table.contiguous(),
            None if cache_batch_idx is None else cache_batch_idx.contiguous(), cos, sin,
            *k_cache.stride()[:3], *v_cache.stride()[:3], *k.stride()[:3], *v.stride()[:3],
            0 if block_table is None else block_table.shape[1],
            n_new, capacity(k_cache, block_table), n_blocks, rotary_cos.shape[0] if rotates else 0,
            HEADS=heads, HEAD_DIM=head_dim, BLOCK_R=rows, BLOCK_D=block_d,
            PAGE=0 if block_table is None else k_cache.shape[1],
            ROTARY_DIM=2 * rotary_cos.shape[1] if rotates else 0, INTERLEAVED=params.rotary_interleaved,
            num_warps=NUM_WARPS,
        )  # fmt: skip
