"""The kernels of attention over a cache: flash decoding (Dao et al., 2023).

A program owns a tile of rows of one sequence and key head, and one split of that sequence's keys. A row is one query of
one head: row r is query r // GROUP of head r % GROUP of the group, so that the heads that share a key head read its
keys together, and a causal mask still cuts off whole blocks. Splits are even parts of the keys that the tile sees,
found from the sequence's own length on the device; with more than one split, a program leaves its unscaled sum, its
largest exponent and its total for a second kernel, which adds splits up in a fixed order.
Programs of neighbouring key heads run side by side: in memory their keys are neighbours.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tilestack.kernels.attention.triton_blocks import sees, span
from tilestack.kernels.attention.triton_scores import exponents
from tilestack.kernels.kv_cache_append.triton_rotary import load_rotated
from tilestack.kernels.triton_numerics import dot, exponent_unit, exponential, logarithm


@triton.jit
def _sequence(cu_seqlens_ptr, n_sequences, total_q, block, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    """Packed queries: (sequence, its first query, its queries, block in it) of a block of rows.

    The blocks of sequence s begin at offset[s] * GROUP // BLOCK_M + s: at most one block of a sequence is empty, and
    the number of blocks needs no length from the device. Queries after the last offset are taken for one more sequence.
    """
    low = 0
    high = n_sequences + 1
    while high - low > 1:
        middle = (low + high) // 2
        fits = tl.load(cu_seqlens_ptr + middle) * GROUP // BLOCK_M + middle <= block
        low = tl.where(fits, middle, low)
        high = tl.where(fits, high, middle)
    start = tl.load(cu_seqlens_ptr + low)
    following = tl.load(cu_seqlens_ptr + tl.minimum(low + 1, n_sequences))
    end = tl.where(low < n_sequences, following, total_q)
    return low, start, end - start, block - start * GROUP // BLOCK_M - low


@triton.jit
def _pages(table_ptr, start, length, BLOCK_N: tl.constexpr, PAGE: tl.constexpr):
    """The page of each position of a block, or the one page that it lies in; 0 from `length` on and without pages."""
    if PAGE == 0:
        return 0
    elif PAGE % BLOCK_N == 0:
        return tl.load(table_ptr + start // PAGE, mask=start < length, other=0)
    else:
        positions = start + tl.arange(0, BLOCK_N)
        return tl.load(table_ptr + positions // PAGE, mask=positions < length, other=0)


@triton.jit
def _load_block(
    base_ptr, pages, start, length, stride_page, stride_row, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr, PAGE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Positions `start` and following of one head as [BLOCK_N, BLOCK_D]; 0 from `length` on and beyond HEAD_DIM."""
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    if PAGE == 0:
        pointers = base_ptr + tl.cast(start, tl.int64) * stride_row + (offs_n[:, None] * stride_row + offs_d)
    elif PAGE % BLOCK_N == 0:
        first_ptr = base_ptr + tl.cast(pages, tl.int64) * stride_page + tl.cast(start % PAGE, tl.int64) * stride_row
        pointers = first_ptr + (offs_n[:, None] * stride_row + offs_d)
    else:
        rows = tl.cast((start + offs_n) % PAGE, tl.int64) * stride_row + tl.cast(pages, tl.int64) * stride_page
        pointers = base_ptr + (rows[:, None] + offs_d)
    if MASKED and HEAD_DIM < BLOCK_D:
        return tl.load(pointers, mask=(start + offs_n < length)[:, None] & (offs_d < HEAD_DIM), other=0.0)
    elif MASKED:
        return tl.load(pointers, mask=(start + offs_n < length)[:, None], other=0.0)
    elif HEAD_DIM < BLOCK_D:
        return tl.load(pointers, mask=offs_d < HEAD_DIM, other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def _attend(
    acc, total, largest, q, k_ptr, v_ptr, table_ptr, stride_kp, stride_ks, stride_vp, stride_vs, queries, slopes,
    begin, end, shift, length_k, softmax_scale, softcap, left, right,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, PAGE: tl.constexpr, HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_SLOPES: tl.constexpr, PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    pages = _pages(table_ptr, begin, length_k, BLOCK_N, PAGE)
    for start in tl.range(begin, end, BLOCK_N):
        k = _load_block(k_ptr, pages, start, length_k, stride_kp, stride_ks, HEAD_DIM, BLOCK_D, BLOCK_N, PAGE, MASKED)
        scores = dot(q, tl.trans(k), None, PRECISION)
        scale = softmax_scale * exponent_unit(PRECISION)
        keys = start + tl.arange(0, BLOCK_N)
        distance = keys[None, :] - queries[:, None] - shift
        if HAS_SOFTCAP or HAS_SLOPES:
            scores, _ = exponents(
                scores, distance, softmax_scale, softcap, slopes[:, None], HAS_SOFTCAP, HAS_SLOPES, PRECISION
            )
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
        v = _load_block(v_ptr, pages, start, length_k, stride_vp, stride_vs, HEAD_DIM, BLOCK_D, BLOCK_N, PAGE, MASKED)
        acc = dot(weights.to(v.dtype), v, acc, PRECISION)
        largest = new_largest
        # one block ahead: a load whose address is loaded in the same iteration is not prefetched as far
        pages = _pages(table_ptr, start + BLOCK_N, length_k, BLOCK_N, PAGE)
    return acc, total, largest


@triton.jit
def _with_sink(largest, total, sinks_ptr, heads, mask, PRECISION: tl.constexpr):
    """(what the sum is multiplied by, largest, total) after the head's sink has joined as one more key of value 0."""
    sink = tl.load(sinks_ptr + heads, mask=mask, other=0.0).to(tl.float32) * exponent_unit(PRECISION)
    new_largest = tl.maximum(largest, sink)
    subtracted = tl.where(new_largest == float("-inf"), 0.0, new_largest)
    shrink = exponential(largest - subtracted, PRECISION)
    return shrink, new_largest, total * shrink + exponential(sink - subtracted, PRECISION)


@triton.jit(do_not_specialize=["n_sequences", "total_q", "n_blocks", "n_splits", "room", "new_keys", "table_rows"])
def attention_kvcache_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, largest_ptr, total_ptr, cache_seqlens_ptr, block_table_ptr,
    cache_batch_idx_ptr, cache_leftpad_ptr, cu_seqlens_q_ptr, sinks_ptr, slopes_ptr, cos_ptr, sin_ptr,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh, stride_table,
    stride_slopes, n_sequences, total_q, n_heads, n_blocks, n_splits, room, new_keys, table_rows,
    softmax_scale, softcap, left, right,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PAGE: tl.constexpr, PACKED: tl.constexpr, SPLIT: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, ROTARY_DIM: tl.constexpr, INTERLEAVED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    kv_heads = n_heads // GROUP
    kv_head = tl.cast(tl.program_id(0) % kv_heads, tl.int64)
    block = tl.program_id(0) // kv_heads % n_blocks
    split = tl.program_id(0) // kv_heads // n_blocks % n_splits
    sequence = tl.program_id(0) // kv_heads // n_blocks // n_splits
    start_q = sequence * 0
    length_q = total_q
    batch = tl.cast(sequence, tl.int64)
    if PACKED:
        sequence, start_q, length_q, block = _sequence(cu_seqlens_q_ptr, n_sequences, total_q, block, GROUP, BLOCK_M)
    first = block * BLOCK_M
    if first < 0 or first >= length_q * GROUP:
        return

    known = sequence < n_sequences  # else packed queries that belong to none
    taken = room
    if cache_seqlens_ptr is not None:
        taken = tl.load(cache_seqlens_ptr + sequence, mask=known, other=0)
    begin_k = 0
    if cache_leftpad_ptr is not None:
        begin_k = tl.load(cache_leftpad_ptr + sequence, mask=known, other=0)
    length_k = tl.where(known, tl.maximum(tl.minimum(taken + new_keys, room) - begin_k, 0), 0)
    row_of_cache = tl.cast(sequence, tl.int64)
    if cache_batch_idx_ptr is not None:
        row_of_cache = tl.cast(tl.load(cache_batch_idx_ptr + sequence, mask=known, other=0), tl.int64)
    k_ptr += kv_head * stride_kh
    v_ptr += kv_head * stride_vh
    table_ptr = block_table_ptr
    if PAGE == 0:
        k_ptr += row_of_cache * stride_kb + tl.cast(begin_k, tl.int64) * stride_ks
        v_ptr += row_of_cache * stride_vb + tl.cast(begin_k, tl.int64) * stride_vs
    else:
        table_ptr += tl.cast(sequence, tl.int64) * stride_table

    rows = first + tl.arange(0, BLOCK_M)
    queries = rows // GROUP
    heads = kv_head * GROUP + rows % GROUP
    row_mask = queries < length_q
    positions = taken + queries * (1 if HAS_LEFT or HAS_RIGHT else 0)
    q = load_rotated(
        q_ptr + batch * stride_qb + tl.cast(start_q + queries, tl.int64) * stride_qs + heads * stride_qh, row_mask,
        positions, cos_ptr, sin_ptr, table_rows, HEAD_DIM, BLOCK_D, ROTARY_DIM, INTERLEAVED,
    )  # fmt: skip
    HAS_SLOPES: tl.constexpr = slopes_ptr is not None
    slopes = tl.zeros([BLOCK_M], tl.float32)
    if slopes_ptr is not None:
        slopes_ptr += tl.cast(sequence, tl.int64) * stride_slopes
        slopes = tl.load(slopes_ptr + heads, mask=row_mask & known, other=0.0)

    shift = length_k - length_q
    last = tl.minimum(first + BLOCK_M, length_q * GROUP) - 1
    begin, full_begin, full_end, end = span(
        first // GROUP, last // GROUP, shift, length_k, left, right, BLOCK_N, HAS_LEFT, HAS_RIGHT
    )
    if SPLIT:
        share = tl.cdiv(tl.cdiv(tl.maximum(end - begin, 0), BLOCK_N), n_splits) * BLOCK_N
        begin = begin + split * share
        end = tl.minimum(begin + share, end)
        full_begin = tl.minimum(tl.maximum(full_begin, begin), tl.maximum(end, begin))
        full_end = tl.minimum(tl.maximum(full_end, full_begin), tl.maximum(end, full_begin))

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    if HAS_LEFT:
        acc, total, largest = _attend(
            acc, total, largest, q, k_ptr, v_ptr, table_ptr, stride_kb, stride_ks, stride_vb, stride_vs, queries,
            slopes, begin, tl.minimum(full_begin, end), shift, length_k, softmax_scale, softcap, left, right,
            HEAD_DIM, BLOCK_D, BLOCK_N, PAGE, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, HAS_SLOPES, PRECISION, True,
        )  # fmt: skip
    acc, total, largest = _attend(
        acc, total, largest, q, k_ptr, v_ptr, table_ptr, stride_kb, stride_ks, stride_vb, stride_vs, queries,
        slopes, full_begin, full_end, shift, length_k, softmax_scale, softcap, left, right,
        HEAD_DIM, BLOCK_D, BLOCK_N, PAGE, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, HAS_SLOPES, PRECISION, False,
    )  # fmt: skip
    acc, total, largest = _attend(
        acc, total, largest, q, k_ptr, v_ptr, table_ptr, stride_kb, stride_ks, stride_vb, stride_vs, queries,
        slopes, full_end, end, shift, length_k, softmax_scale, softcap, left, right,
        HEAD_DIM, BLOCK_D, BLOCK_N, PAGE, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, HAS_SLOPES, PRECISION, True,
    )  # fmt: skip

    offs_d = tl.arange(0, BLOCK_D)[None, :]
    token = batch * total_q + start_q + queries  # in dense input total_q is the length of one sequence
    if SPLIT:
        place = split * tl.cast(tl.num_programs(0) // n_blocks // kv_heads // n_splits, tl.int64) * total_q + token
        place = place * n_heads + heads
        tl.store(largest_ptr + place, largest, mask=row_mask)
        tl.store(total_ptr + place, total, mask=row_mask)
        written = row_mask & (total > 0.0)  # the other kernel does not read the sum of a split that saw no key
        mask = written[:, None] & (offs_d < HEAD_DIM)
        tl.store(out_ptr + place[:, None] * HEAD_DIM + offs_d, acc, mask=mask)
    else:
        if sinks_ptr is not None:
            shrink, largest, total = _with_sink(largest, total, sinks_ptr, heads, row_mask, PRECISION)
            acc = acc * shrink[:, None]
        total = tl.where(total == 0.0, 1.0, total)  # a query that sees no key: out = 0, lse = -inf
        out = (acc / total[:, None]).to(out_ptr.dtype.element_ty)
        mask = row_mask[:, None] & (offs_d < HEAD_DIM)
        tl.store(out_ptr + (token * n_heads + heads)[:, None] * HEAD_DIM + offs_d, out, mask=mask)
        lse = largest * (1.0 / exponent_unit(PRECISION)) + logarithm(total, PRECISION)
        lse_place = (batch * n_heads + heads) * total_q + start_q + queries
        tl.store(lse_ptr + lse_place, lse, mask=row_mask)


@triton.jit(do_not_specialize=["total_q", "n_splits"])
def attention_kvcache_combine_kernel(
    parts_ptr, largest_ptr, total_ptr, out_ptr, lse_ptr, sinks_ptr, total_q, n_heads, n_splits,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program adds up the splits of one query of one head, BLOCK_S at a time."""
    row = tl.cast(tl.program_id(0), tl.int64)
    stride = tl.cast(tl.num_programs(0), tl.int64)
    offs_d = tl.arange(0, BLOCK_D)
    acc = tl.zeros([BLOCK_D], tl.float32)
    total = tl.zeros([1], tl.float32)
    largest = tl.full([1], float("-inf"), tl.float32)
    for start in tl.range(0, n_splits, BLOCK_S):
        split = start + tl.arange(0, BLOCK_S)
        places = tl.cast(split, tl.int64) * stride + row
        exponents = tl.load(largest_ptr + places, mask=split < n_splits, other=float("-inf"))
        totals = tl.load(total_ptr + places, mask=split < n_splits, other=0.0)
        mask = (totals > 0.0)[:, None] & (offs_d < HEAD_DIM)[None, :]
        parts = tl.load(parts_ptr + places[:, None] * HEAD_DIM + offs_d[None, :], mask=mask, other=0.0)
        new_largest = tl.maximum(largest, tl.max(exponents, 0))
        subtracted = tl.where(new_largest == float("-inf"), 0.0, new_largest)
        weights = exponential(exponents - subtracted, PRECISION)
        shrink = exponential(largest - subtracted, PRECISION)
        total = total * shrink + tl.sum(weights * totals, 0)
        acc = acc * shrink + tl.sum(weights[:, None] * parts, 0)
        largest = new_largest
    head = row % n_heads + tl.arange(0, 1)
    if sinks_ptr is not None:
        shrink, largest, total = _with_sink(largest, total, sinks_ptr, head, head >= 0, PRECISION)
        acc = acc * shrink
    total = tl.where(total == 0.0, 1.0, total)
    out = (acc / total).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * HEAD_DIM + offs_d, out, mask=offs_d < HEAD_DIM)
    token = row // n_heads
    lse = largest * (1.0 / exponent_unit(PRECISION)) + logarithm(total, PRECISION)
    tl.store(lse_ptr + (token // total_q * n_heads + head) * total_q + token % total_q, lse)
