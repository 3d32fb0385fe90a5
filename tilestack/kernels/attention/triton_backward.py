"""The backward kernels of attention in Triton: FlashAttention-2 (Dao, 2023), algorithm 2, split in two.

    P = exp(S - lse)    delta = sum_d out * dout    dP = dout v'    dS = P * (dP - delta)
    dq = softmax_scale * dS k       dk = softmax_scale * dS' q      dv = P' dout

The first kernel owns blocks of queries: it makes delta, then dq. The second owns blocks of keys and makes dk and dv,
summed over the query heads of the group in their order. Scores are computed twice, and nothing is added atomically:
the same input gives the same bits. Behind a soft cap dS is multiplied by 1 - tanh^2; dropout, drawn anew, acts on the
weights of dv and on dP.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tilestack.kernels.attention.triton_blocks import VARYING, load_rows, locate, sees, span, store_rows
from tilestack.kernels.attention.triton_scores import exponents, kept, load_seed, load_slope
from tilestack.kernels.triton_numerics import dot, exponent_unit, exponential


@triton.jit
def _add_dq(
    dq, q, dout, lse, delta, k_ptr, v_ptr, stride_k, stride_v, first, begin, full_begin, full_end, end, shift,
    length_k, softmax_scale, left, right, softcap, slope, seed, offset, sequence_head, threshold, rescale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_ALIBI: tl.constexpr,
    HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    rows = first + tl.arange(0, BLOCK_M)
    for start in tl.range(begin, end, BLOCK_N):
        k = load_rows(k_ptr, start, stride_k, length_k, BLOCK_N, HEAD_DIM, BLOCK_D, True)
        v = load_rows(v_ptr, start, stride_v, length_k, BLOCK_N, HEAD_DIM, BLOCK_D, True)
        scores = dot(q, tl.trans(k), None, PRECISION)
        scale = softmax_scale * exponent_unit(PRECISION)
        keys = start + tl.arange(0, BLOCK_N)
        distance = keys[None, :] - rows[:, None] - shift
        if HAS_SOFTCAP or HAS_ALIBI:
            scores, tanh = exponents(scores, distance, softmax_scale, softcap, slope, HAS_SOFTCAP, HAS_ALIBI, PRECISION)
            scale = 1.0
        weights = exponential(scores * scale - lse[:, None], PRECISION)
        if (start < full_begin) | (start >= full_end):
            visible = sees(keys[None, :], distance, length_k, left, right, HAS_LEFT, HAS_RIGHT)
            weights = tl.where(visible, weights, 0.0)
        dweights = dot(dout, tl.trans(v), None, PRECISION)
        if HAS_DROPOUT:
            keep = kept(first, start, sequence_head, seed, offset, threshold, BLOCK_M, BLOCK_N)
            dweights = tl.where(keep, dweights * rescale, 0.0)
        dscores = weights * (dweights - delta[:, None])
        if HAS_SOFTCAP:
            dscores *= 1.0 - tanh * tanh
        dq = dot(dscores.to(k.dtype), k, dq, PRECISION)
    return dq


@triton.jit(do_not_specialize=VARYING)
def attention_bwd_dq_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, dout_ptr, lse_ptr, delta_ptr, dq_ptr, cu_seqlens_q_ptr, cu_seqlens_k_ptr,
    slopes_ptr, seed_ptr,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    stride_dob, stride_dos, stride_doh,
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
    stride_s = n_heads * HEAD_DIM
    q_ptr += batch * stride_qb + start_q * stride_qs + head * stride_qh
    k_ptr += batch * stride_kb + start_k * stride_ks + head // GROUP * stride_kh
    v_ptr += batch * stride_vb + start_k * stride_vs + head // GROUP * stride_vh
    dout_ptr += batch * stride_dob + start_q * stride_dos + head * stride_doh
    out_ptr += (batch * total_q + start_q) * stride_s + head * HEAD_DIM
    dq_ptr += (batch * total_q + start_q) * stride_s + head * HEAD_DIM
    rows = first + tl.arange(0, BLOCK_M)
    offs_lse = (batch * n_heads + head) * total_q + start_q + rows
    q = load_rows(q_ptr, first, stride_qs, length_q, BLOCK_M, HEAD_DIM, BLOCK_D, True)
    dout = load_rows(dout_ptr, first, stride_dos, length_q, BLOCK_M, HEAD_DIM, BLOCK_D, True)
    out = load_rows(out_ptr, first, stride_s, length_q, BLOCK_M, HEAD_DIM, BLOCK_D, True)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    tl.store(delta_ptr + offs_lse, delta, mask=rows < length_q)
    lse = load_lse(lse_ptr + offs_lse, rows < length_q, PRECISION)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    dq = _add_dq(
        dq, q, dout, lse, delta, k_ptr, v_ptr, stride_ks, stride_vs, first, begin, full_begin, full_end, end, shift,
        length_k, softmax_scale, left, right, softcap, slope, seed, offset, sequence_head, threshold, rescale,
        HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, HAS_ALIBI, HAS_DROPOUT, PRECISION,
    )  # fmt: skip
    store_rows(dq_ptr, first, stride_s, length_q, dq * softmax_scale, BLOCK_M, HEAD_DIM, BLOCK_D)


@triton.jit
def load_lse(pointers, mask, PRECISION: tl.constexpr):
    """lse in the kernel's unit; +inf for rows that see no key or do not exist, so that their weights are 0."""
    lse = tl.load(pointers, mask=mask, other=float("inf")) * exponent_unit(PRECISION)
    return tl.where(lse == float("-inf"), float("inf"), lse)


@triton.jit
def _add_dk_dv(
    dk, dv, k, v, q_ptr, dout_ptr, lse_ptr, delta_ptr, stride_q, stride_do, first, begin, full_begin, full_end, end,
    shift, length_q, length_k, softmax_scale, left, right, softcap, slope, seed, offset, sequence_head, threshold,
    rescale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_ALIBI: tl.constexpr,
    HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # everything is transposed, [keys, queries], so that weights and dscores are left operands straight from registers
    keys = first + tl.arange(0, BLOCK_N)
    for start in tl.range(begin, end, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        q = load_rows(q_ptr, start, stride_q, length_q, BLOCK_M, HEAD_DIM, BLOCK_D, True)
        lse = load_lse(lse_ptr + rows, rows < length_q, PRECISION)
        scores = dot(k, tl.trans(q), None, PRECISION)
        scale = softmax_scale * exponent_unit(PRECISION)
        distance = keys[:, None] - rows[None, :] - shift
        if HAS_SOFTCAP or HAS_ALIBI:
            scores, tanh = exponents(scores, distance, softmax_scale, softcap, slope, HAS_SOFTCAP, HAS_ALIBI, PRECISION)
            scale = 1.0
        weights = exponential(scores * scale - lse[None, :], PRECISION)
        if HAS_LEFT or HAS_RIGHT:  # noqa: SIM102  (decided when it is compiled)
            if (start < full_begin) | (start >= full_end):
                visible = sees(keys[:, None], distance, length_k, left, right, HAS_LEFT, HAS_RIGHT)
                weights = tl.where(visible, weights, 0.0)
        dout = load_rows(dout_ptr, start, stride_do, length_q, BLOCK_M, HEAD_DIM, BLOCK_D, True)
        if HAS_DROPOUT:
            keep = tl.trans(kept(start, first, sequence_head, seed, offset, threshold, BLOCK_M, BLOCK_N))
            dv = dot(tl.where(keep, weights, 0.0).to(dout.dtype), dout, dv, PRECISION)
        else:
            dv = dot(weights.to(dout.dtype), dout, dv, PRECISION)
        delta = tl.load(delta_ptr + rows, mask=rows < length_q, other=0.0)
        dweights = dot(v, tl.trans(dout), None, PRECISION)
        if HAS_DROPOUT:
            dweights = tl.where(keep, dweights * rescale, 0.0)
        dscores = weights * (dweights - delta[None, :])
        if HAS_SOFTCAP:
            dscores *= 1.0 - tanh * tanh
        dk = dot(dscores.to(q.dtype), q, dk, PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=VARYING)
def attention_bwd_dk_dv_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, cu_seqlens_q_ptr, cu_seqlens_k_ptr,
    slopes_ptr, seed_ptr,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    stride_dob, stride_dos, stride_doh,
    n_documents, total_q, total_k, n_blocks, n_kv_heads, softmax_scale, left, right, softcap, stride_slopes,
    threshold, rescale,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PACKED: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    HAS_ALIBI: tl.constexpr, HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0) % n_blocks  # with causal, the first block is seen by most queries: the longest work first
    kv_head = tl.cast(tl.program_id(0) // n_blocks % n_kv_heads, tl.int64)
    batch = tl.cast(tl.program_id(0) // n_blocks // n_kv_heads, tl.int64)
    start_k, length_k, start_q, length_q, block, document = locate(
        cu_seqlens_k_ptr, cu_seqlens_q_ptr, n_documents, total_k, total_q, block, BLOCK_N, PACKED
    )
    first = block * BLOCK_N
    if first >= length_k:
        return
    shift = length_k - length_q
    last = tl.minimum(first + BLOCK_N, length_k) - 1
    # seen from the keys, left and right change places
    begin, full_begin, full_end, end = span(first, last, -shift, length_q, right, left, BLOCK_M, HAS_RIGHT, HAS_LEFT)

    start_q = tl.cast(start_q, tl.int64)
    start_k = tl.cast(start_k, tl.int64)
    k_ptr += batch * stride_kb + start_k * stride_ks + kv_head * stride_kh
    v_ptr += batch * stride_vb + start_k * stride_vs + kv_head * stride_vh
    head = kv_head * GROUP
    q_ptr += batch * stride_qb + start_q * stride_qs + head * stride_qh
    dout_ptr += batch * stride_dob + start_q * stride_dos + head * stride_doh
    offs_lse = (batch * n_kv_heads * GROUP + head) * total_q + start_q
    lse_ptr += offs_lse
    delta_ptr += offs_lse
    offset = ((batch * total_k + start_k) * n_kv_heads + kv_head) * HEAD_DIM
    dk_ptr += offset
    dv_ptr += offset
    k = load_rows(k_ptr, first, stride_ks, length_k, BLOCK_N, HEAD_DIM, BLOCK_D, True)
    v = load_rows(v_ptr, first, stride_vs, length_k, BLOCK_N, HEAD_DIM, BLOCK_D, True)
    sequence = batch + document
    seed, offset = load_seed(seed_ptr, HAS_DROPOUT)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for member in range(GROUP):
        slope = load_slope(slopes_ptr, stride_slopes, sequence, n_documents, head + member, HAS_ALIBI, PACKED)
        sequence_head = (sequence * n_kv_heads * GROUP + head + member).to(tl.int32)
        dk, dv = _add_dk_dv(
            dk, dv, k, v, q_ptr, dout_ptr, lse_ptr, delta_ptr, stride_qs, stride_dos,
            first, begin, full_begin, full_end, end, shift, length_q, length_k, softmax_scale, left, right,
            softcap, slope, seed, offset, sequence_head, threshold, rescale, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N,
            HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, HAS_ALIBI, HAS_DROPOUT, PRECISION,
        )  # fmt: skip
        q_ptr += stride_qh
        dout_ptr += stride_doh
        lse_ptr += total_q
        delta_ptr += total_q
    if HAS_DROPOUT:
        dv *= rescale
    stride_s = n_kv_heads * HEAD_DIM
    store_rows(dk_ptr, first, stride_s, length_k, dk * softmax_scale, BLOCK_N, HEAD_DIM, BLOCK_D)
    store_rows(dv_ptr, first, stride_s, length_k, dv, BLOCK_N, HEAD_DIM, BLOCK_D)
