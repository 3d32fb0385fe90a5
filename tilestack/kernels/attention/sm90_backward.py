"""Attention backward for Hopper, in Gluon.

An item is BLOCK_N keys of one document, one key head and HEADS of its query heads. A program takes one item, keeps dK
and dV in registers and walks over the query blocks that see its keys:

    S' = K Q',  P' = exp2(S' scale - lse),  dP' = V dO',  dS' = P' (dP' - delta),
    dV += P' dO,  dK += dS' Q,  dQ += dS K

* Partitions: two consumer warpgroups (64 keys each for S', dP', dK, dV; half of D each for dQ, so that dQ is one sum
  over all keys of the item) and one producer warp (TMA: Q with lse, dO with delta, through rings).
* P' and dS' stay in registers as left operands for dV and dK; dS' also goes through shared memory for dQ.
* dQ is added into a float32 scratch tensor by TMA's reduction, in the order of the accumulator's registers, so that the
  stores are wide and free of bank conflicts; `finish_dq_kernel` puts it in order. Where the query heads of a key head
  are spread over several items, dK and dV go the same way. Additions from several items come in any order: the last
  bits may differ from run to run.
* Items go in sections whose Q, dO and dQ fit into L2 together, and longest first within a section.

`prepare_kernel` writes delta = rowsum(out * dout) and lse in powers of two, in blocks of BLOCK_M queries that begin
with each document; a row that is no query, or sees no key, gets lse = inf: its probabilities are 0 without a mask.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tilestack.kernels import launch
from tilestack.kernels._gluon import (
    barrier_arrive,
    barrier_sync,
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
    tensor_descriptor,
    thread_barrier,
    tma,
    tma_reduce_add,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from tilestack.kernels.attention.layout import rows_by_heads
from tilestack.kernels.attention.sm90_configs import backward_config, backward_section
from tilestack.kernels.attention.sm90_schedule import FIELDS, key_table, query_table

LOG2E = 1.4426950408889634
Q_FREE = gl.constexpr(8)  # hardware barriers: Q_FREE + stage, DO_FREE + stage
DO_FREE = gl.constexpr(11)


@gluon.jit
def key_item(items, n_columns, section, left, right, HEADS: gl.constexpr, GROUP: gl.constexpr, BLOCK_M: gl.constexpr,
             BLOCK_N: gl.constexpr, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr):  # fmt: skip
    """This program's item: (its document's first key row, keys, first query row, queries, first query block; the item's
    block of keys, its key head, its first query head, its query blocks [low, high), its own index over the documents).

    A document's items are its blocks of keys times n_columns (key heads times GROUP / HEADS), section by section."""
    pid = gl.program_id(0)
    entry = items + FIELDS * (pid // n_columns + 1)
    row_k = gl.load(entry)
    n_k = gl.load(entry + 1)
    row_q = gl.load(entry + 2)
    n_q = gl.load(entry + 3)
    in_document = gl.load(entry + 4)
    first_block = gl.load(entry + 5)
    n_blocks = gl.maximum((n_k + BLOCK_N - 1) // BLOCK_N, 1)  # a program without an item has no keys and no queries
    rest = in_document * n_columns + pid % n_columns
    begun = rest // (n_blocks * section)
    rest = rest - begun * n_blocks * section
    n = rest // section
    column = begun * section + rest - n * section
    kv_head = column // (GROUP // HEADS)
    head = column * HEADS
    shift = n_k - n_q  # a query's own position among the keys is its index plus this
    low = n * 0
    high = (n_q + BLOCK_M - 1) // BLOCK_M
    if HAS_RIGHT:
        low = gl.maximum(n * BLOCK_N - shift - right, 0) // BLOCK_M
    if HAS_LEFT:
        high = gl.minimum(high, (gl.maximum(n * BLOCK_N + BLOCK_N + left - shift, 0) + BLOCK_M - 1) // BLOCK_M)
    index = pid // n_columns - in_document + n
    return row_k, n_k, row_q, shift, first_block, n, kv_head, head, low, gl.maximum(high, low), index


@gluon.jit
def producer(q_desc, k_desc, v_desc, do_desc, lse_desc, delta_desc, q_s, k_s, v_s, do_s, lse_s, delta_s,
             kv_full, q_full, do_full, items, n_columns, section, n_q_blocks, left, right,
             HEADS: gl.constexpr, GROUP: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, D: gl.constexpr,
             STAGES: gl.constexpr, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr):  # fmt: skip
    row_k, _, row_q, _, first_block, n, kv_head, head, low, high, _ = key_item(
        items, n_columns, section, left, right, HEADS, GROUP, BLOCK_M, BLOCK_N, HAS_LEFT, HAS_RIGHT
    )
    steps = high - low
    mbarrier.expect(kv_full, k_desc.block_type.nbytes + v_desc.block_type.nbytes)
    tma.async_copy_global_to_shared(k_desc, [row_k + n * BLOCK_N, kv_head * D], kv_full, k_s.index(0))
    tma.async_copy_global_to_shared(v_desc, [row_k + n * BLOCK_N, kv_head * D], kv_full, v_s.index(0))
    for it in range(steps * HEADS):
        g = it // steps
        m = low + it - g * steps
        stage = it % STAGES
        row = row_q + m * BLOCK_M
        scalars = ((head + g) * n_q_blocks + first_block + m) * BLOCK_M
        if it >= STAGES:
            barrier_sync(Q_FREE + stage, "288", 1)
        mbarrier.expect(q_full.index(stage), q_desc.block_type.nbytes + lse_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(q_desc, [row, (head + g) * D], q_full.index(stage), q_s.index(stage))
        tma.async_copy_global_to_shared(lse_desc, [scalars], q_full.index(stage), lse_s.index(stage))
        if it >= STAGES:
            barrier_sync(DO_FREE + stage, "288", 1)
        mbarrier.expect(do_full.index(stage), do_desc.block_type.nbytes + delta_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(do_desc, [row, (head + g) * D], do_full.index(stage), do_s.index(stage))
        tma.async_copy_global_to_shared(delta_desc, [scalars], do_full.index(stage), delta_s.index(stage))
    # take the last releases, so that no hardware barrier is left half full
    for it in range(steps * HEADS, steps * HEADS + STAGES):
        if it >= STAGES:
            barrier_sync(Q_FREE + it % STAGES, "288", 1)
            barrier_sync(DO_FREE + it % STAGES, "288", 1)


@gluon.jit
def halves(x, BLOCK_N: gl.constexpr, D: gl.constexpr):
    """An accumulator [BLOCK_N, D] as two halves of D, each in register order: octet of columns, thread, 4 values."""
    x = gl.permute(gl.reshape(x, [BLOCK_N // 16, 2, 8, 2, D // 16, 4, 2]), [4, 0, 2, 5, 1, 6, 3])
    a, b = gl.split(x)
    return gl.reshape(a, [BLOCK_N * D // 512, 256]), gl.reshape(b, [BLOCK_N * D // 512, 256])


@gluon.jit
def store_tile(desc, pointer, value, staging, row, column, rows_left, stride, layout: gl.constexpr,
               BLOCK_N: gl.constexpr, D: gl.constexpr):  # fmt: skip
    """Write [BLOCK_N, D] of which rows_left rows exist: through TMA when all do."""
    if rows_left >= BLOCK_N:
        staging.store(value)
        fence_async_shared()
        thread_barrier()
        tma.async_copy_shared_to_global(desc, [row, column], staging)
    else:
        rows = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, layout))
        columns = gl.arange(0, D, layout=gl.SliceLayout(0, layout))
        corner = gl.cast(row, gl.int64) * stride + column
        places = (rows * stride)[:, None] + columns[None, :]
        gl.store(pointer + corner + places, value, mask=(rows < rows_left)[:, None])


@gluon.jit
def consumers(dk_desc, dv_desc, dk_ptr, dv_ptr, dq_desc, q_s, k_s, v_s, do_s, lse_s, delta_s, ds_s, dq_s,
              kv_full, q_full, do_full, items, n_columns, section, n_q_blocks, left, right, scale, scale2, stride_dk,
              HEADS: gl.constexpr, GROUP: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, D: gl.constexpr,
              STAGES: gl.constexpr, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr):  # fmt: skip
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, BLOCK_M, 16])  # S', dP' [keys, queries]
    kv_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, D, 16])  # dK, dV [keys, D]
    dq_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, D // 2, 16])  # dQ [queries, D]
    left_operand: gl.constexpr = gl.DotOperandLayout(0, kv_layout, 2)
    of_query: gl.constexpr = gl.SliceLayout(0, s_layout)
    dtype: gl.constexpr = q_s.dtype
    _, n_k, _, shift, first_block, n, _, head, low, high, _ = key_item(
        items, n_columns, section, left, right, HEADS, GROUP, BLOCK_M, BLOCK_N, HAS_LEFT, HAS_RIGHT
    )
    steps = high - low
    zeros = gl.zeros([BLOCK_N, BLOCK_M], gl.float32, s_layout)
    dq_zeros = gl.zeros([BLOCK_M, D], gl.float32, dq_layout)
    dk = gl.zeros([BLOCK_N, D], gl.float32, kv_layout)
    dv = gl.zeros([BLOCK_N, D], gl.float32, kv_layout)
    # query i sees key j if first_seen[j] <= i <= last_seen[j]; query blocks [masked_below, masked_from) see all keys
    keys = n * BLOCK_N + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, s_layout))
    queries = gl.arange(0, BLOCK_M, layout=of_query)
    first_seen = gl.where(keys < n_k, keys - (shift + right) if HAS_RIGHT else 0, 1 << 30)
    last_seen = keys + (left - shift)
    masked_below = low
    masked_from = high
    if HAS_RIGHT:
        masked_below = (gl.maximum(n * BLOCK_N + BLOCK_N - 1 - shift - right, 0) + BLOCK_M - 1) // BLOCK_M
    if HAS_LEFT:
        masked_from = gl.maximum(n * BLOCK_N + left - shift + 1, 0) // BLOCK_M
    masked_below = gl.where(n * BLOCK_N + BLOCK_N > n_k, high, masked_below)
    block = head * n_q_blocks + first_block + low  # of dQ
    stage = 0
    phase = 0
    m = low
    mbarrier.wait(kv_full, 0)
    dk_issued = warpgroup_mma_init(dk)
    thread_barrier()
    for it in range(steps * HEADS):
        # an index that is always 0 and that the compiler cannot know: loop-invariant descriptors would take registers
        zero = it >> 30
        k = k_s.index(zero)
        v = v_s.index(zero)
        ds_tile = ds_s.index(zero)
        q = q_s.index(stage)
        do = do_s.index(stage)
        mbarrier.wait(q_full.index(stage), phase)
        s_issued = warpgroup_mma(k, q.permute((1, 0)), zeros, use_acc=False, is_async=True)
        mbarrier.wait(do_full.index(stage), phase)
        dp_issued = warpgroup_mma(v, do.permute((1, 0)), zeros, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(1, deps=[s_issued])
        p = gl.exp2(s * scale2 - lse_s.index(stage).load(of_query)[None, :])
        if (m < masked_below) | (m >= masked_from):
            seen = first_seen[:, None] <= (queries + m * BLOCK_M)[None, :]
            if HAS_LEFT:
                seen = seen & (last_seen[:, None] >= (queries + m * BLOCK_M)[None, :])
            p = gl.where(seen, p, 0.0)
        p_left = gl.convert_layout(p.to(dtype), left_operand)
        dv_issued = warpgroup_mma(p_left, do, dv, is_async=True)
        delta = delta_s.index(stage).load(of_query)
        dp = warpgroup_mma_wait(1, deps=[dp_issued])
        ds = (p * (dp - delta[None, :])).to(dtype)
        ds_tile.store(ds)
        fence_async_shared()
        tma.store_wait(0)  # the previous dQ has left shared memory
        thread_barrier()  # dS' of both warpgroups is there
        dq_issued = warpgroup_mma(ds_tile.permute((1, 0)), k, dq_zeros, use_acc=False, is_async=True)
        dk_issued = warpgroup_mma(gl.convert_layout(ds, left_operand), q, dk_issued, is_async=True)
        dv = warpgroup_mma_wait(2, deps=[dv_issued])
        barrier_arrive(DO_FREE + stage, "288", 8)
        dq = warpgroup_mma_wait(1, deps=[dq_issued])
        ordered = gl.permute(gl.reshape(dq, [BLOCK_M // 16, 2, 8, 2, D // 16, 4, 2]), [4, 3, 0, 2, 5, 1, 6])
        dq_s.store(gl.reshape(ordered, [BLOCK_M * D // 256, 256]))
        fence_async_shared()
        thread_barrier()  # dQ is there, and both warpgroups have read dS'
        tma_reduce_add(dq_desc, [block * (BLOCK_M * D // 256), 0], dq_s)
        dk_issued = warpgroup_mma_init(warpgroup_mma_wait(0, deps=[dk_issued]))
        barrier_arrive(Q_FREE + stage, "288", 8)
        m = m + 1
        block = gl.where(m == high, block + 1 + n_q_blocks - steps, block + 1)
        m = gl.where(m == high, low, m)
        stage = stage + 1
        phase = gl.where(stage == STAGES, phase ^ 1, phase)
        stage = gl.where(stage == STAGES, 0, stage)
    dk = warpgroup_mma_wait(0, deps=[dk_issued])
    tma.store_wait(0)
    thread_barrier()
    # read the item again: kept through the loop, its numbers would take registers
    row_k, n_k, _, _, _, n, kv_head, _, _, _, index = key_item(
        items, n_columns, section, left, right, HEADS, GROUP, BLOCK_M, BLOCK_N, HAS_LEFT, HAS_RIGHT
    )
    if HEADS == GROUP:
        row = row_k + n * BLOCK_N
        rows_left = n_k - n * BLOCK_N
        column = kv_head * D
        dk = (dk * scale).to(dtype)
        store_tile(dk_desc, dk_ptr, dk, k_s.index(0), row, column, rows_left, stride_dk, kv_layout, BLOCK_N, D)
        dv = dv.to(dtype)
        store_tile(dv_desc, dv_ptr, dv, v_s.index(0), row, column, rows_left, stride_dk, kv_layout, BLOCK_N, D)
    else:  # other items add to the same dK and dV
        float_layout: gl.constexpr = dk_desc.layout
        HALF_ROWS: gl.constexpr = BLOCK_N * D // 512
        row = (index * (n_columns * HEADS // GROUP) + kv_head) * (2 * HALF_ROWS)
        buffers = (
            k_s._reinterpret(gl.float32, [HALF_ROWS, 256], float_layout),
            v_s._reinterpret(gl.float32, [HALF_ROWS, 256], float_layout),
            q_s._reinterpret(gl.float32, [HALF_ROWS, 256], float_layout),
            do_s._reinterpret(gl.float32, [HALF_ROWS, 256], float_layout),
        )
        dk_low, dk_high = halves(dk, BLOCK_N, D)
        dv_low, dv_high = halves(dv, BLOCK_N, D)
        buffers[0].store(dk_low)
        buffers[1].store(dk_high)
        buffers[2].store(dv_low)
        buffers[3].store(dv_high)
        fence_async_shared()
        thread_barrier()
        tma_reduce_add(dk_desc, [row, 0], buffers[0])
        tma_reduce_add(dk_desc, [row + HALF_ROWS, 0], buffers[1])
        tma_reduce_add(dv_desc, [row, 0], buffers[2])
        tma_reduce_add(dv_desc, [row + HALF_ROWS, 0], buffers[3])
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["section", "n_q_blocks", "left", "right"])
def attention_backward_kernel(q_desc, k_desc, v_desc, do_desc, lse_desc, delta_desc, dq_desc, dk_desc, dv_desc,
                              dk_ptr, dv_ptr, items, n_columns, section, n_q_blocks, left, right,
                              scale, scale2, stride_dk,
                              HEADS: gl.constexpr, GROUP: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
                              D: gl.constexpr, STAGES: gl.constexpr, HAS_LEFT: gl.constexpr,
                              HAS_RIGHT: gl.constexpr):  # fmt: skip
    dtype: gl.constexpr = q_desc.dtype
    ds_layout: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    k_s = gl.allocate_shared_memory(dtype, [1, BLOCK_N, D], k_desc.layout)
    v_s = gl.allocate_shared_memory(dtype, [1, BLOCK_N, D], v_desc.layout)
    q_s = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, D], q_desc.layout)
    do_s = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, D], do_desc.layout)
    ds_s = gl.allocate_shared_memory(dtype, [1, BLOCK_N, BLOCK_M], ds_layout)
    dq_s = gl.allocate_shared_memory(gl.float32, [BLOCK_M * D // 256, 256], dq_desc.layout)
    lse_s = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], lse_desc.layout)
    delta_s = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], delta_desc.layout)
    kv_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    q_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    do_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(kv_full, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(do_full.index(i), count=1)
    gl.warp_specialize([
        (consumers, (dk_desc, dv_desc, dk_ptr, dv_ptr, dq_desc, q_s, k_s, v_s, do_s, lse_s, delta_s, ds_s, dq_s,
                     kv_full, q_full, do_full, items, n_columns, section, n_q_blocks, left, right,
                     scale, scale2, stride_dk, HEADS, GROUP, BLOCK_M, BLOCK_N, D, STAGES, HAS_LEFT, HAS_RIGHT)),
        (producer, (q_desc, k_desc, v_desc, do_desc, lse_desc, delta_desc, q_s, k_s, v_s, do_s, lse_s, delta_s,
                    kv_full, q_full, do_full, items, n_columns, section, n_q_blocks, left, right,
                    HEADS, GROUP, BLOCK_M, BLOCK_N, D, STAGES, HAS_LEFT, HAS_RIGHT)),
    ], [1], [24])  # fmt: skip


@triton.jit
def prepare_kernel(
    out_ptr, dout_ptr, lse_ptr, lse2_ptr, delta_ptr, dq_ptr, blocks, stride_out, stride_dout, stride_lse, n_blocks,
    D: tl.constexpr, BLOCK_M: tl.constexpr, FIELDS: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    head = tl.program_id(1)
    if block < tl.load(blocks):
        entry = blocks + FIELDS * (block + 1)
        row = tl.load(entry)
        n_rows = tl.load(entry + 1)
        row_lse = tl.load(entry + 5)
        rows = tl.arange(0, BLOCK_M)
        columns = tl.arange(0, D)
        mask = rows < n_rows
        places = (row + rows).to(tl.int64)[:, None]
        out = tl.load(out_ptr + places * stride_out + head * D + columns[None, :], mask=mask[:, None], other=0.0)
        dout = tl.load(dout_ptr + places * stride_dout + head * D + columns[None, :], mask=mask[:, None], other=0.0)
        lse = tl.load(lse_ptr + head.to(tl.int64) * stride_lse + row_lse + rows, mask=mask, other=float("-inf"))
        place = (head * n_blocks + block).to(tl.int64)
        lse2 = tl.where(lse == float("-inf"), float("inf"), lse * 1.4426950408889634)
        tl.store(lse2_ptr + place * BLOCK_M + rows, lse2)
        tl.store(delta_ptr + place * BLOCK_M + rows, tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1))
        tl.store(dq_ptr + place * (BLOCK_M * D) + tl.arange(0, BLOCK_M * D), tl.zeros([BLOCK_M * D], tl.float32))


@triton.jit
def finish_dq_kernel(
    scratch_ptr, dq_ptr, blocks, scale, stride_dq, n_blocks,
    D: tl.constexpr, BLOCK_M: tl.constexpr, FIELDS: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    head = tl.program_id(1)
    if block < tl.load(blocks):
        entry = blocks + FIELDS * (block + 1)
        row = tl.load(entry)
        n_rows = tl.load(entry + 1)
        place = (head * n_blocks + block).to(tl.int64)
        x = tl.load(scratch_ptr + place * (BLOCK_M * D) + tl.arange(0, BLOCK_M * D)) * scale
        x = tl.permute(tl.reshape(x, [D // 16, 2, BLOCK_M // 16, 8, 4, 2, 2]), [2, 5, 3, 1, 0, 4, 6])
        x = tl.reshape(x, [BLOCK_M, D])
        rows = tl.arange(0, BLOCK_M)
        places = (row + rows).to(tl.int64)[:, None] * stride_dq + head * D + tl.arange(0, D)[None, :]
        tl.store(dq_ptr + places, x.to(dq_ptr.dtype.element_ty), mask=(rows < n_rows)[:, None])


@triton.jit
def finish_dkv_kernel(
    dk_scratch_ptr, dv_scratch_ptr, dk_ptr, dv_ptr, items, scale, n_kv_heads,
    D: tl.constexpr, BLOCK_N: tl.constexpr, FIELDS: tl.constexpr,
):  # fmt: skip
    # a program does one half of D of one block of dK (even) or dV (odd)
    item = tl.program_id(0)
    kv_head = tl.program_id(1)
    is_dv = tl.program_id(2) % 2
    half = tl.program_id(2) // 2
    HALF: tl.constexpr = BLOCK_N * D // 2
    if item < tl.load(items):
        entry = items + FIELDS * (item + 1)
        n = tl.load(entry + 4)
        first = tl.load(entry) + n * BLOCK_N
        rows_left = tl.load(entry + 1) - n * BLOCK_N
        offset = ((item * n_kv_heads + kv_head).to(tl.int64) * 2 + half) * HALF + tl.arange(0, HALF)
        x = tl.load(dv_scratch_ptr + offset) if is_dv else tl.load(dk_scratch_ptr + offset) * scale
        x = tl.permute(tl.reshape(x, [D // 16, BLOCK_N // 16, 8, 4, 2, 2]), [1, 4, 2, 0, 3, 5])
        x = tl.reshape(x, [BLOCK_N, D // 2])
        rows = tl.arange(0, BLOCK_N)
        columns = half * (D // 2) + tl.arange(0, D // 2)
        places = (first + rows).to(tl.int64)[:, None] * (n_kv_heads * D) + kv_head * D + columns[None, :]
        mask = (rows < rows_left)[:, None]
        if is_dv:
            tl.store(dv_ptr + places, x.to(dv_ptr.dtype.element_ty), mask=mask)
        else:
            tl.store(dk_ptr + places, x.to(dk_ptr.dtype.element_ty), mask=mask)


def backward(dout, dlse, q, k, v, cu_seqlens_q, cu_seqlens_k, out, lse, *, needs, params):
    """Gradients of the contract; tensors as `refuses` lets them through."""
    dq, dk, dv = (torch.empty(each.shape, dtype=each.dtype, device=each.device) for each in (q, k, v))
    if q.numel() == 0 or k.numel() == 0:
        found = {"q": dq.zero_(), "k": dk.zero_(), "v": dv.zero_()}
        return tuple(found[name] for name in needs)
    heads, head_dim = q.shape[-2:]
    kv_heads = k.shape[-2]
    group = heads // kv_heads
    config = backward_config(head_dim, group)
    block_m, block_n = config.BLOCK_M, config.BLOCK_N
    blocks, n_blocks = query_table(q, k, cu_seqlens_q, cu_seqlens_k, block_m)
    items, n_items = key_table(q, k, cu_seqlens_q, cu_seqlens_k, block_m, block_n)
    n_columns = heads // config.HEADS
    shared = group > config.HEADS
    out_rows, dout_rows = rows_by_heads(out), rows_by_heads(dout)
    new = {"dtype": torch.float32, "device": q.device}
    lse2, delta = torch.empty(2, heads * n_blocks * block_m, **new)
    dq_scratch = torch.empty(heads * n_blocks * block_m * head_dim // 256, 256, **new)
    if shared:  # register order, a block of BLOCK_N keys after the other
        dk_sum, dv_sum = torch.zeros(2, n_items * kv_heads * block_n * head_dim // 256, 256, **new)
        dkv_descs = (tensor_descriptor(each, [block_n * head_dim // 512, 256], 0) for each in (dk_sum, dv_sum))
    else:
        dkv_descs = (tensor_descriptor(rows_by_heads(each), [block_n, head_dim]) for each in (dk, dv))
    q_desc, do_desc = (tensor_descriptor(each, [block_m, head_dim]) for each in (rows_by_heads(q), dout_rows))
    k_desc, v_desc = (tensor_descriptor(rows_by_heads(each), [block_n, head_dim]) for each in (k, v))
    lse_desc, delta_desc = (tensor_descriptor(each, [block_m], 0) for each in (lse2, delta))
    dq_desc = tensor_descriptor(dq_scratch, [block_m * head_dim // 256, 256], 0)
    constants = {"D": head_dim, "FIELDS": FIELDS.value, "num_warps": 4}
    with launch.on_device(q):
        prepare_kernel[(n_blocks, heads)](
            out_rows, dout_rows, lse, lse2, delta, dq_scratch, blocks, out_rows.stride(0), dout_rows.stride(0),
            lse.shape[-1], n_blocks, BLOCK_M=block_m, **constants,
        )  # fmt: skip
        attention_backward_kernel[(n_items * n_columns,)](
            q_desc, k_desc, v_desc, do_desc, lse_desc, delta_desc, dq_desc, *dkv_descs, dk, dv, items, n_columns,
            backward_section(n_columns, config.HEADS, q.shape[-3], head_dim), n_blocks,
            params.window_left, params.window_right,
            params.softmax_scale, params.softmax_scale * LOG2E, kv_heads * head_dim, GROUP=group, D=head_dim,
            **vars(config), HAS_LEFT=params.window_left >= 0, HAS_RIGHT=params.window_right >= 0, num_warps=8,
        )  # fmt: skip
        finish_dq_kernel[(n_blocks, heads)](
            dq_scratch, dq, blocks, params.softmax_scale, heads * head_dim, n_blocks, BLOCK_M=block_m, **constants
        )
        if shared:
            finish_dkv_kernel[(n_items, kv_heads, 4)](
                dk_sum, dv_sum, dk, dv, items, params.softmax_scale, kv_heads, BLOCK_N=block_n, **constants
            )
    found = {"q": dq, "k": dk, "v": dv}
    return tuple(found[name] for name in needs)
