"""Attention forward for Hopper, in Gluon: TMA, mbarriers, warp specialisation, wgmma, ping-pong.

A program is one producer warp and two consumer warpgroups of 64 queries each. The grid is persistent and walks over
work items (128 queries of one head of one document), heads fastest, so that the heads that share a key head run
together; dense input goes in sections of heads and documents whose K and V fit into L2, longest item first.

* The producer loads Q once an item, and K and V tile by tile, from the last visible key to the first, through a ring of
  STAGES buffers. Full buffers are mbarriers (TMA counts its bytes on them), free ones are hardware barriers, which
  cost less.
* A consumer issues Q K' of the next tile before P V of this one, so the tensor cores work while it takes exponentials.
  The wait for the next K tile stands between the exponentials and the wait for P V on purpose: ptxas would move that
  wait above the exponentials, but not across the branch of an mbarrier wait.
* Ping-pong: the consumers take turns to issue products, so that one's exponentials run under the other's products.
* Only tiles on the diagonal, at the window's left end or at a document's end are masked.

P stays in registers as the left operand of P V. The running maximum starts at a finite floor, so that a query that sees
no key ends with out = 0 and lse = -inf.
"""

from __future__ import annotations

import torch

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
    warpgroup_mma,
    warpgroup_mma_wait,
)
from tilestack.kernels.attention.layout import empty_lse, rows_by_heads
from tilestack.kernels.attention.sm90_configs import FORWARD
from tilestack.kernels.attention.sm90_schedule import dense_schedule, piece, query_table, share, work_item

LOG2E = 1.4426950408889634
K_FREE = gl.constexpr(6)  # hardware barriers: K_FREE + stage, V_FREE + stage, Q_FREE + consumer, TURN + consumer
V_FREE = gl.constexpr(9)
Q_FREE = gl.constexpr(12)
TURN = gl.constexpr(14)
FLOOR = gl.constexpr(-1.0e30)


@gluon.jit
def key_tiles(n_q, n_k, position, left, right, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
              HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr):  # fmt: skip
    """The key tiles [first, last) that any query of the item sees; at least one, so that every item has a tile."""
    high = n_k
    if HAS_RIGHT:
        high = gl.minimum(n_k, position + gl.minimum(n_q, BLOCK_M) + right)
    last = (gl.maximum(high, 1) + BLOCK_N - 1) // BLOCK_N
    first = last * 0
    if HAS_LEFT:
        first = gl.minimum(gl.maximum(position - left, 0) // BLOCK_N, last - 1)
    return first, last


@gluon.jit
def producer(q_desc, k_desc, v_desc, q_s, k_s, v_s, q_full, k_full, v_full,
             items, schedule, n_heads, left, right,
             GROUP: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
             SCHEDULED: gl.constexpr, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr):  # fmt: skip
    HALF: gl.constexpr = BLOCK_M // 2
    loaded = 0
    n_items_done = 0
    first_piece, end_piece, step_piece = share(schedule, gl.load(items) * n_heads, SCHEDULED)
    for index in range(first_piece, end_piece, step_piece):
        t = piece(schedule, index, SCHEDULED)
        head, row_q, n_q, row_k, n_k, position, _ = work_item(t, items, n_heads)
        first, last = key_tiles(n_q, n_k, position, left, right, BLOCK_M, BLOCK_N, HAS_LEFT, HAS_RIGHT)
        column_q = head * D
        column_k = (head // GROUP) * D
        for step in range(last - first):
            row = row_k + (last - 1 - step) * BLOCK_N
            stage = loaded % STAGES
            if loaded >= STAGES:
                barrier_sync(K_FREE + stage, "288", 1)
            mbarrier.expect(k_full.index(stage), k_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(k_desc, [row, column_k], k_full.index(stage), k_s.index(stage))
            if step == 0:
                for consumer in gl.static_range(2):
                    if n_items_done > 0:
                        barrier_sync(Q_FREE + consumer, "160", 1)
                    mbarrier.expect(q_full.index(consumer), q_desc.block_type.nbytes)
                    tma.async_copy_global_to_shared(
                        q_desc, [row_q + consumer * HALF, column_q], q_full.index(consumer), q_s.index(consumer)
                    )
            if loaded >= STAGES:
                barrier_sync(V_FREE + stage, "288", 1)
            mbarrier.expect(v_full.index(stage), v_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(v_desc, [row, column_k], v_full.index(stage), v_s.index(stage))
            loaded += 1
        n_items_done += 1
    # take the last releases, so that no hardware barrier is left half full
    for consumer in gl.static_range(2):
        if n_items_done > 0:
            barrier_sync(Q_FREE + consumer, "160", 1)
    for release in range(loaded, loaded + STAGES):
        if release >= STAGES:
            barrier_sync(K_FREE + release % STAGES, "288", 1)
            barrier_sync(V_FREE + release % STAGES, "288", 1)


@gluon.jit
def visible_scores(s, tile, full_first, full_last, n_k, own, columns, left, right, BLOCK_N: gl.constexpr,
                   HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr):  # fmt: skip
    """Scores with -inf where a query does not see the key; tiles in [full_first, full_last) are seen by every query."""
    if (tile < full_first) | (tile >= full_last):
        keys = columns + tile * BLOCK_N
        seen = (keys < n_k)[None, :]
        if HAS_RIGHT:
            seen = seen & (keys[None, :] <= (own + right)[:, None])
        if HAS_LEFT:
            seen = seen & (keys[None, :] >= (own - left)[:, None])
        s = gl.where(seen, s, float("-inf"))
    return s


@gluon.jit
def consumer(which: gl.constexpr, o_desc, out, lse, q_s, k_s, v_s, o_s, q_full, k_full, v_full,
             items, schedule, n_heads, left, right, scale, stride_lse, stride_out,
             BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
             SCHEDULED: gl.constexpr, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr):  # fmt: skip
    HALF: gl.constexpr = BLOCK_M // 2
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    dtype: gl.constexpr = o_desc.dtype
    zeros = gl.zeros([HALF, BLOCK_N], gl.float32, s_layout)
    rows = gl.arange(0, HALF, layout=gl.SliceLayout(1, s_layout))
    columns = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, s_layout))
    o_rows = gl.arange(0, HALF, layout=gl.SliceLayout(1, o_layout))
    o_columns = gl.arange(0, D, layout=gl.SliceLayout(0, o_layout))
    q = q_s.index(which)
    staging = o_s.index(which)
    stage = 0
    phase = 0
    q_phase = 0
    if which == 1:
        barrier_arrive(TURN, "256", 4)
    thread_barrier()
    first_piece, end_piece, step_piece = share(schedule, gl.load(items) * n_heads, SCHEDULED)
    for index in range(first_piece, end_piece, step_piece):
        t = piece(schedule, index, SCHEDULED)
        _, _, n_q, _, n_k, position, _ = work_item(t, items, n_heads)
        first, last = key_tiles(n_q, n_k, position, left, right, BLOCK_M, BLOCK_N, HAS_LEFT, HAS_RIGHT)
        low = position + which * HALF
        own = rows + low
        full_last = n_k // BLOCK_N
        full_first = 0
        if HAS_RIGHT:
            full_last = gl.minimum(n_k, gl.maximum(low + right + 1, 0)) // BLOCK_N
        if HAS_LEFT:
            full_first = (gl.maximum(low + HALF - 1 - left, 0) + BLOCK_N - 1) // BLOCK_N
        acc = gl.zeros([HALF, D], gl.float32, o_layout)
        mbarrier.wait(q_full.index(which), q_phase)
        mbarrier.wait(k_full.index(stage), phase)
        issued = warpgroup_mma(q, k_s.index(stage).permute((1, 0)), zeros, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(0, deps=[issued])
        barrier_arrive(K_FREE + stage, "288", 4)
        tile = last - 1
        s = visible_scores(s, tile, full_first, full_last, n_k, own, columns, left, right, BLOCK_N, HAS_LEFT, HAS_RIGHT)
        m = gl.maximum(gl.max(s, 1) * scale, FLOOR)
        p = gl.exp2(s * scale - m[:, None])
        total = gl.sum(p, 1)
        p_left = gl.convert_layout(p.to(dtype), p_layout)
        v_stage = stage
        v_phase = phase
        phase = gl.where(v_stage + 1 == STAGES, v_phase ^ 1, v_phase)
        stage = gl.where(v_stage + 1 == STAGES, 0, v_stage + 1)
        mbarrier.wait(k_full.index(stage), phase, pred=last - first > 1)
        for step in range(1, last - first):
            barrier_sync(TURN + which, "256", 4)
            issued = warpgroup_mma(q, k_s.index(stage).permute((1, 0)), zeros, use_acc=False, is_async=True)
            mbarrier.wait(v_full.index(v_stage), v_phase)
            summed = warpgroup_mma(p_left, v_s.index(v_stage), acc, is_async=True)
            barrier_arrive(TURN + 1 - which, "256", 4)
            s = warpgroup_mma_wait(1, deps=[issued])
            barrier_arrive(K_FREE + stage, "288", 4)
            tile = last - 1 - step
            s = visible_scores(
                s, tile, full_first, full_last, n_k, own, columns, left, right, BLOCK_N, HAS_LEFT, HAS_RIGHT
            )
            m_new = gl.maximum(m, gl.max(s, 1) * scale)
            p = gl.exp2(s * scale - m_new[:, None])
            alpha = gl.exp2(m - m_new)
            m = m_new
            total = total * alpha + gl.sum(p, 1)
            next_phase = gl.where(stage + 1 == STAGES, phase ^ 1, phase)
            next_stage = gl.where(stage + 1 == STAGES, 0, stage + 1)
            mbarrier.wait(k_full.index(next_stage), next_phase, pred=step + 1 < last - first)
            acc = warpgroup_mma_wait(0, deps=[summed])
            barrier_arrive(V_FREE + v_stage, "288", 4)
            acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, o_layout))[:, None]
            p_left = gl.convert_layout(p.to(dtype), p_layout)
            v_stage = stage
            v_phase = phase
            stage = next_stage
            phase = next_phase
        barrier_arrive(Q_FREE + which, "160", 4)
        mbarrier.wait(v_full.index(v_stage), v_phase)
        summed = warpgroup_mma(p_left, v_s.index(v_stage), acc, is_async=True)
        # read the item again: kept through the loop, its numbers would take registers
        head, row_q, n_q, _, _, _, row_lse = work_item(piece(schedule, index, SCHEDULED), items, n_heads)
        mine = n_q - which * HALF
        natural = (m + gl.log2(total)) * 0.6931471805599453
        gl.store(lse + (head * stride_lse + row_lse + which * HALF + rows), natural, mask=rows < mine)
        inverse = gl.where(total > 0, 1.0 / total, 0.0)
        acc = warpgroup_mma_wait(0, deps=[summed])
        barrier_arrive(V_FREE + v_stage, "288", 4)
        result = (acc * gl.convert_layout(inverse, gl.SliceLayout(1, o_layout))[:, None]).to(dtype)
        row = row_q + which * HALF
        if mine >= HALF:
            tma.store_wait(0)
            thread_barrier()
            staging.store(result)
            fence_async_shared()
            thread_barrier()
            tma.async_copy_shared_to_global(o_desc, [row, head * D], staging)
        elif mine > 0:  # the document's end: the rows below belong to the next one
            corner = gl.cast(row, gl.int64) * stride_out + head * D
            places = (o_rows * stride_out)[:, None] + o_columns[None, :]
            gl.store(out + corner + places, result, mask=(o_rows < mine)[:, None])
        q_phase = q_phase ^ 1
    if which == 0:
        barrier_sync(TURN, "256", 4)
    tma.store_wait(0)


@gluon.jit
def consumer_0(o_desc, out, lse, q_s, k_s, v_s, o_s, q_full, k_full, v_full,
               items, schedule, n_heads, left, right, scale, stride_lse, stride_out,
               BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
               SCHEDULED: gl.constexpr, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr):  # fmt: skip
    consumer(0, o_desc, out, lse, q_s, k_s, v_s, o_s, q_full, k_full, v_full,
             items, schedule, n_heads, left, right, scale, stride_lse, stride_out,
             BLOCK_M, BLOCK_N, D, STAGES, SCHEDULED, HAS_LEFT, HAS_RIGHT)  # fmt: skip


@gluon.jit
def consumer_1(o_desc, out, lse, q_s, k_s, v_s, o_s, q_full, k_full, v_full,
               items, schedule, n_heads, left, right, scale, stride_lse, stride_out,
               BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
               SCHEDULED: gl.constexpr, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr):  # fmt: skip
    consumer(1, o_desc, out, lse, q_s, k_s, v_s, o_s, q_full, k_full, v_full,
             items, schedule, n_heads, left, right, scale, stride_lse, stride_out,
             BLOCK_M, BLOCK_N, D, STAGES, SCHEDULED, HAS_LEFT, HAS_RIGHT)  # fmt: skip


@gluon.jit(do_not_specialize=["left", "right"])
def attention_forward_kernel(q_desc, k_desc, v_desc, o_desc, out, lse,
                             items, schedule, n_heads, left, right, scale, stride_lse, stride_out,
                             GROUP: gl.constexpr, BLOCK_M: gl.constexpr,
                             BLOCK_N: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
                             SCHEDULED: gl.constexpr, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr):  # fmt: skip
    HALF: gl.constexpr = BLOCK_M // 2
    q_s = gl.allocate_shared_memory(q_desc.dtype, [2, HALF, D], q_desc.layout)
    o_s = gl.allocate_shared_memory(q_desc.dtype, [2, HALF, D], o_desc.layout)
    k_s = gl.allocate_shared_memory(q_desc.dtype, [STAGES, BLOCK_N, D], k_desc.layout)
    v_s = gl.allocate_shared_memory(q_desc.dtype, [STAGES, BLOCK_N, D], v_desc.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(q_full.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
    gl.warp_specialize([
        (consumer_0, (o_desc, out, lse, q_s, k_s, v_s, o_s, q_full, k_full, v_full,
                      items, schedule, n_heads, left, right, scale, stride_lse, stride_out,
                      BLOCK_M, BLOCK_N, D, STAGES, SCHEDULED, HAS_LEFT, HAS_RIGHT)),
        (consumer_1, (o_desc, out, lse, q_s, k_s, v_s, o_s, q_full, k_full, v_full,
                      items, schedule, n_heads, left, right, scale, stride_lse, stride_out,
                      BLOCK_M, BLOCK_N, D, STAGES, SCHEDULED, HAS_LEFT, HAS_RIGHT)),
        (producer, (q_desc, k_desc, v_desc, q_s, k_s, v_s, q_full, k_full, v_full,
                    items, schedule, n_heads, left, right,
                    GROUP, BLOCK_M, BLOCK_N, D, STAGES, SCHEDULED, HAS_LEFT, HAS_RIGHT)),
    ], [4, 1], [240, 24])  # fmt: skip


def forward(q, k, v, cu_seqlens_q, cu_seqlens_k, sinks, alibi_slopes, dropout_seed, params):
    """out and lse of the contract; q, k, v as `refuses` lets them through."""
    out, lse = torch.empty(q.shape, dtype=q.dtype, device=q.device), empty_lse(q)
    if q.numel() == 0:
        return out, lse
    if k.numel() == 0:
        return out.zero_(), lse.fill_(-torch.inf)
    config = FORWARD[q.shape[-1]]
    heads, head_dim = q.shape[-2:]
    dense = cu_seqlens_q is None
    items, bound = query_table(q, k, cu_seqlens_q, cu_seqlens_k, config.BLOCK_M)
    programs = min(bound * heads, launch.multiprocessors(q))
    schedule = dense_schedule(q, k, config.BLOCK_M, config.BLOCK_N, params, programs) if dense else items
    q_desc, k_desc, v_desc, o_desc = (
        tensor_descriptor(rows_by_heads(each), [block, head_dim])
        for each, block in (
            (q, config.BLOCK_M // 2),
            (k, config.BLOCK_N),
            (v, config.BLOCK_N),
            (out, config.BLOCK_M // 2),
        )
    )
    with launch.on_device(q):
        attention_forward_kernel[(programs,)](
            q_desc, k_desc, v_desc, o_desc, out, lse,
            items, schedule, heads, params.window_left, params.window_right,
            params.softmax_scale * LOG2E, lse.shape[-1], heads * head_dim,
            GROUP=heads // k.shape[-2], D=head_dim, **vars(config),
            SCHEDULED=dense, HAS_LEFT=params.window_left >= 0, HAS_RIGHT=params.window_right >= 0, num_warps=4,
        )  # fmt: skip
    return out, lse
