"""The forward kernel of attention in Triton: FlashAttention-2 (Dao, 2023), algorithm 1.

A program owns a block of queries of one head and walks over the blocks of keys that they see, with a running maximum
and sum. The scale costs nothing: it is part of the multiply-add that makes an exponent. A sink is where the maximum and
the sum begin.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tilestack.kernels.attention.triton_blocks import VARYING, load_rows, locate, sees, span, store_rows
from tilestack.kernels.attention.triton_scores import exponents, kept, load_seed, load_slope
from tilestack.kernels.triton_numerics import dot, exponent_unit, exponential, logarithm


@triton.jit
def _attend(
    acc, total, largest, q, k_ptr, v_ptr, stride_k, stride_v, first, begin, end, shift, length_k, softmax_scale,
    left, right, softcap, slope, seed, offset, sequence_head, threshold,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_ALIBI: tl.constexpr,
    HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    rows = first + tl.arange(0, BLOCK_M)
    for start in tl.range(begin, end, BLOCK_N):
        k = load_rows(k_ptr, start, stride_k, length_k, BLOCK_N, HEAD_DIM, BLOCK_D, MASKED)
        scores = dot(q, tl.trans(k), None, PRECISION)
        scale = softmax_scale * exponent_unit(PRECISION)
        keys = start + tl.arange(0, BLOCK_N)
        distance = keys[None, :] - rows[:, None] - shift
        if HAS_SOFTCAP or HAS_ALIBI:
            scores, _ = exponents(scores, distance, softmax_scale, softcap, slope, HAS_SOFTCAP, HAS_ALIBI, PRECISION)
            scale = 1.0
        if MASKED:
            visible = sees(keys[None, :], distance, length_k, left, right, HAS_LEFT, HAS_RIGHT)
            scores = tl.where(visible, scores, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(scores, 1) * scale)
        subtracted = new_largest
        if MASKED:  # a query that has seen no key yet: avoid -inf - -inf
            subtracted = tl.where(new_largest == float("-inf"), 0.0, new_largest)
        weights = exponential(scores * scale - subtracted[:, None], PRECISION)
        shrink = exponential(largest - subtracted, PRECISION)
        total = total * shrink + tl.sum(weights, 1)
        acc = acc * shrink[:, None]
        if HAS_DROPOUT:
            keep = kept(first, start, sequence_head, seed, offset, threshold, BLOCK_M, BLOCK_N)
            weights = tl.where(keep, weights, 0.0)
        v = load_rows(v_ptr, start, stride_v, length_k, BLOCK_N, HEAD_DIM, BLOCK_D, MASKED)
        acc = dot(weights.to(v.dtype), v, acc, PRECISION)
        largest = new_largest
    return acc, total, largest


@triton.jit(do_not_specialize=VARYING)
def attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, sinks_ptr, cu_seqlens_q_ptr, cu_seqlens_k_ptr, slopes_ptr, seed_ptr,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    n_documents, total_q, total_k, n_blocks, n_heads, softmax_scale, left, right, softcap, stride_slopes, threshold,
    rescale,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PACKED: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    HAS_ALIBI: tl.constexpr, HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0) % n_blocks
    head = tl.cast(tl.program_id(0) // n_blocks % n_heads, tl.int64)
    batch = tl.cast(tl.program_id(0) // n_blocks // n_heads, tl.int64)
    start_q, length_q, start_k, length_k, block, document = locate(
        cu_seqlens_q_ptr, cu_seqlens_k_ptr, n_documents, total_q, total_k, block, BLOCK_M, PACKED
    )
    if HAS_RIGHT:  # the last block sees most keys: the longest work first
        block = tl.cdiv(length_q, BLOCK_M) - 1 - block
    first = block * BLOCK_M
    if first < 0 or first >= length_q:
        return
    shift = length_k - length_q
    last = tl.minimum(first + BLOCK_M, length_q) - 1
    begin, full_begin, full_end, end = span(first, last, shift, length_k, left, right, BLOCK_N, HAS_LEFT, HAS_RIGHT)

    sequence = batch + document
    slope = load_slope(slopes_ptr, stride_slopes, sequence, n_documents, head, HAS_ALIBI, PACKED)
    seed, offset = load_seed(seed_ptr, HAS_DROPOUT)
    sequence_head = (sequence * n_heads + head).to(tl.int32)
    start_q = tl.cast(start_q, tl.int64)
    start_k = tl.cast(start_k, tl.int64)
    q_ptr += batch * stride_qb + start_q * stride_qs + head * stride_qh
    k_ptr += batch * stride_kb + start_k * stride_ks + head // GROUP * stride_kh
    v_ptr += batch * stride_vb + start_k * stride_vs + head // GROUP * stride_vh
    q = load_rows(q_ptr, first, stride_qs, length_q, BLOCK_M, HEAD_DIM, BLOCK_D, True)
    rows = first + tl.arange(0, BLOCK_M)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + head).to(tl.float32) * exponent_unit(PRECISION)
        total += 1.0
        largest = tl.zeros([BLOCK_M], tl.float32) + sink
    if HAS_LEFT:
        acc, total, largest = _attend(
            acc, total, largest, q, k_ptr, v_ptr, stride_ks, stride_vs, first, begin, full_begin, shift, length_k,
            softmax_scale, left, right, softcap, slope, seed, offset, sequence_head, threshold, HEAD_DIM, BLOCK_D,
            BLOCK_M, BLOCK_N, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, HAS_ALIBI, HAS_DROPOUT, PRECISION, True,
        )  # fmt: skip
    acc, total, largest = _attend(
        acc, total, largest, q, k_ptr, v_ptr, stride_ks, stride_vs, first, full_begin, full_end, shift, length_k,
        softmax_scale, left, right, softcap, slope, seed, offset, sequence_head, threshold, HEAD_DIM, BLOCK_D,
        BLOCK_M, BLOCK_N, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, HAS_ALIBI, HAS_DROPOUT, PRECISION, False,
    )  # fmt: skip
    acc, total, largest = _attend(
        acc, total, largest, q, k_ptr, v_ptr, stride_ks, stride_vs, first, full_end, end, shift, length_k,
        softmax_scale, left, right, softcap, slope, seed, offset, sequence_head, threshold, HEAD_DIM, BLOCK_D,
        BLOCK_M, BLOCK_N, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, HAS_ALIBI, HAS_DROPOUT, PRECISION, True,
    )  # fmt: skip

    total = tl.where(total == 0.0, 1.0, total)  # a query that sees no key: out = 0, lse = -inf
    out = acc / total[:, None]
    if HAS_DROPOUT:
        out *= rescale
    stride_s = n_heads * HEAD_DIM
    out_ptr += (batch * total_q + start_q) * stride_s + head * HEAD_DIM
    store_rows(out_ptr, first, stride_s, length_q, out, BLOCK_M, HEAD_DIM, BLOCK_D)
    lse = largest * (1.0 / exponent_unit(PRECISION)) + logarithm(total, PRECISION)
    tl.store(lse_ptr + (batch * n_heads + head) * total_q + start_q + rows, lse, mask=rows < length_q)
