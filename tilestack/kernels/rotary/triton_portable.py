"""rotary in Triton.

One program: a block of tokens of one sequence and a few heads. It loads cos and sin of its tokens once, then rotates
head after head: each pair of columns lies in one thread, so that in place is like out of place. The columns behind the
rotated ones are copied, unless it is in place. Lengths and batch sizes are no keys of compilation.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tilestack.kernels import launch
from tilestack.kernels.dispatch import Call
from tilestack.kernels.rotary.configs import HEADS, MAX_HEAD_DIM, NUM_WARPS, block_tokens


def refuses(call: Call) -> str | None:
    head_dim = call.shape("out")[-1]
    if call.dtype("out") == torch.float64:
        return "has no float64 path"
    if head_dim > MAX_HEAD_DIM:
        return f"keeps a head in registers, up to D = {MAX_HEAD_DIM}, got {head_dim}"
    return None


@triton.jit(do_not_specialize=["length", "seqlen_offset", "n_positions", "n_heads"])
def rotary_kernel(
    out_ptr, x_ptr, cos_ptr, sin_ptr, cu_seqlens_ptr, seqlen_offsets_ptr,
    out_stride_b, out_stride_s, out_stride_h, x_stride_b, x_stride_s, x_stride_h,
    length, seqlen_offset, n_positions, n_heads,
    HALF: tl.constexpr, TAIL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_TAIL: tl.constexpr,
    HEADS: tl.constexpr, INTERLEAVED: tl.constexpr, CONJUGATE: tl.constexpr, PACKED: tl.constexpr,
    HAS_OFFSETS: tl.constexpr,
):  # fmt: skip
    sequence = tl.cast(tl.program_id(2), tl.int64)
    start = tl.cast(0, tl.int64)
    if PACKED:
        start = tl.cast(tl.load(cu_seqlens_ptr + sequence), tl.int64)
        length = tl.load(cu_seqlens_ptr + sequence + 1).to(tl.int32) - start.to(tl.int32)
    if HAS_OFFSETS:
        seqlen_offset = tl.load(seqlen_offsets_ptr + sequence).to(tl.int32)
    token = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs = tl.arange(0, BLOCK_HALF)
    mask = (token < length)[:, None] & (offs < HALF)[None, :]
    position = token + seqlen_offset
    table = tl.cast(position, tl.int64)[:, None] * HALF + offs[None, :]
    known = mask & (position < n_positions)[:, None]
    cos = tl.load(cos_ptr + table, mask=known, other=1.0).to(tl.float32)
    sin = tl.load(sin_ptr + table, mask=known, other=0.0).to(tl.float32)
    if CONJUGATE:
        sin = -sin
    first = 2 * offs if INTERLEAVED else offs
    second = first + (1 if INTERLEAVED else HALF)
    row = start + token
    x_rows = (sequence * x_stride_b + row * x_stride_s)[:, None]
    out_rows = (sequence * out_stride_b + row * out_stride_s)[:, None]
    first_head = tl.program_id(1) * HEADS
    for head in range(first_head, min(first_head + HEADS, n_heads)):
        x_head = x_ptr + x_rows + tl.cast(head, tl.int64) * x_stride_h
        out_head = out_ptr + out_rows + tl.cast(head, tl.int64) * out_stride_h
        a = tl.load(x_head + first[None, :], mask=mask, other=0.0).to(tl.float32)
        b = tl.load(x_head + second[None, :], mask=mask, other=0.0).to(tl.float32)
        tl.store(out_head + first[None, :], (a * cos - b * sin).to(out_ptr.dtype.element_ty), mask=mask)
        tl.store(out_head + second[None, :], (b * cos + a * sin).to(out_ptr.dtype.element_ty), mask=mask)
        if TAIL > 0:
            columns = 2 * HALF + tl.arange(0, BLOCK_TAIL)
            behind = (token < length)[:, None] & (columns < 2 * HALF + TAIL)[None, :]
            tl.store(out_head + columns[None, :], tl.load(x_head + columns[None, :], mask=behind), mask=behind)


def update(out, x, cos, sin, cu_seqlens, seqlen_offsets, params) -> None:
    *batch, tokens, heads, head_dim = out.shape
    half = cos.shape[1]
    tail = 0 if x is None else head_dim - 2 * half
    x = out if x is None else x if x.stride(-1) == 1 else x.contiguous()
    length, sequences = (tokens, batch[0]) if batch else (params.max_seqlen, cu_seqlens.numel() - 1)
    if out.numel() == 0 or length * sequences == 0:
        return
    block_half = max(1, launch.next_power_of_2(half))
    block_m = block_tokens(block_half)
    with launch.on_device(out):
        launch.run(
            rotary_kernel, (launch.cdiv(length, block_m), launch.cdiv(heads, HEADS), sequences),
            out, x, cos.contiguous(), sin.contiguous(), cu_seqlens, seqlen_offsets, *_strides(out), *_strides(x),
            length, params.seqlen_offset, cos.shape[0], heads,
            HALF=half, TAIL=tail, BLOCK_M=block_m, BLOCK_HALF=block_half,
            BLOCK_TAIL=max(1, launch.next_power_of_2(tail)), HEADS=HEADS, INTERLEAVED=params.interleaved,
            CONJUGATE=params.conjugate, PACKED=not batch, HAS_OFFSETS=seqlen_offsets is not None,
            num_warps=NUM_WARPS,
        )  # fmt: skip


def _strides(tensor: torch.Tensor) -> tuple[int, int, int]:
    """Strides of batch, sequence and head; packed input has no batch."""
    return tensor.stride(0) if tensor.dim() == 4 else 0, tensor.stride(-3), tensor.stride(-2)
