"""Attention forward for Hopper, in Gluon: TMA, mbarriers, warp specialisation, wgmma, ping-pong.

A program is one producer warp and two or three consumer warpgroups of 64 queries each. The grid is persistent and walks
over work items (64 queries a consumer, of one head of one document), heads fastest, so that the heads that share a key
head run together; dense input goes in sections of heads and documents whose K and V fit into L2, longest item first.

* The producer loads Q once an item, into Q_SLOTS buffers in turn, and K and V tile by tile, from the last visible key
  to the first, through a ring of STAGES buffers. Full buffers are mbarriers (TMA counts its bytes on them), free ones
  are hardware barriers, which cost less.
* A consumer issues Q K' of the next tile before P V of this one. What P V needs first, P narrowed and out rescaled, is
  done between the two, behind the branch of V's mbarrier, which ptxas moves little across: there it costs nothing,
  because the tensor cores work on Q K'. What stays of a tile is a chain of comparisons, exponentials and sums. (With
  three consumers P is narrowed at once: there are no registers for its float32 form.)
* Out is rescaled only where the maximum of a row has grown by more than SLACK since: a weight may be 2^SLACK, not 1.
* Ping-pong: the consumers take turns to issue products, so that this chain runs under the others' products.
* Comparisons and sums of a row are eight that do not wait for one another (partial_row_max, partial_row_sums); sums
  meet at the item's end only.
* Only tiles on the diagonal, at the window's left end or at a document's end are masked, in loops of their own: the
  loop over the others has no branch. (A narrow window has one loop, sm90_configs.one_loop.) The mask is one block of
  PTX that is jumped over where nothing is cut (mask_rows): plain comparisons ptxas makes long before they are used, and
  with those of two ends registers ran out.
* A head dimension that is no power of two is two products: 96 = 64 + 32, 192 = 128 + 64 (D and REST).

P stays in registers as the left operand of P V. Out leaves by TMA through Q's buffer, or at a document's end from
registers, masked. The running maximum starts at a finite floor, so that a query that sees no key ends with out = 0 and
lse = -inf (or the sink's logit).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from tilestack.kernels import launch
from tilestack.kernels._gluon import (
    barrier_arrive,
    barrier_sync,
    beside,
    constexpr_function,
    fence_async_shared,
    gl,
    gluon,
    mask_rows,
    mbarrier,
    narrow,
    partial_row_max,
    partial_row_sums,
    reciprocal,
    scale_rows,
    thread_barrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from tilestack.kernels.attention.features import lse_of_no_keys
from tilestack.kernels.attention.layout import empty_lse, pad_heads
from tilestack.kernels.attention.sm90_configs import Forward, forward_config, one_loop, tile_size
from tilestack.kernels.attention.sm90_schedule import (
    dense_query_table,
    dense_schedule,
    packed_bound,
    packed_query_table,
    piece,
    share,
    work_item,
)
from tilestack.kernels.attention.sm90_tiles import RowTiles
from tilestack.kernels.triton_numerics import LN2, LOG2E

ROWS = gl.constexpr(64)  # queries of a consumer: those of one wgmma
FLOOR = gl.constexpr(-1.0e30)
SLACK = gl.constexpr(8.0)  # powers of two by which a weight may exceed 1 before out is rescaled


@dataclass(frozen=True)
class Variant(Forward):
    """What is fixed when the kernel is compiled: its tiles, the kind of the call, and what follows from them."""

    HEAD_DIM: int  # of the call's tensors; what the kernel reads is padded to WIDTH
    GROUP: int  # query heads of a key head
    SCHEDULED: bool
    HAS_LEFT: bool
    HAS_RIGHT: bool
    HAS_CAP: bool
    HAS_SINKS: bool
    ONE_LOOP: bool  # tiles that every query sees go through the loop of those that are masked
    WIDTH: int
    BLOCK_M: int
    K_FREE: int  # hardware barriers: free buffers, and whose turn it is
    V_FREE: int
    Q_FREE: int
    TURN: int
    THREADS: str  # that meet at a free buffer: the consumers and the producer
    scores: gl.NVMMADistributedLayout
    out: gl.NVMMADistributedLayout
    rest: gl.NVMMADistributedLayout


@constexpr_function
def variant(CONSUMERS, BLOCK_N, D, REST, STAGES, Q_SLOTS, *kind):
    # here and not in the class: Triton compiles again when the text of this function changes
    free = 5  # the first hardware barrier that Triton does not use itself
    return Variant(
        CONSUMERS, BLOCK_N, D, REST, STAGES, Q_SLOTS, *kind,
        WIDTH=D + REST,
        BLOCK_M=64 * CONSUMERS,
        K_FREE=free,
        V_FREE=free + STAGES,
        Q_FREE=free + 2 * STAGES,
        TURN=free + 2 * STAGES + Q_SLOTS,
        THREADS=str(128 * CONSUMERS + 32),
        scores=gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16]),
        out=gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16]),
        rest=gl.NVMMADistributedLayout([3, 0], [4, 1], [16, REST or 8, 16]),
    )  # fmt: skip


@gluon.jit
def key_tiles(n_q, n_k, position, left, right, C: gl.constexpr):
    """The key tiles [first, last) that any query of the item sees; at least one, so that every item has a tile."""
    high = n_k
    if C.HAS_RIGHT:
        high = gl.minimum(n_k, position + gl.minimum(n_q, C.BLOCK_M) + right)
    last = (gl.maximum(high, 1) + C.BLOCK_N - 1) // C.BLOCK_N
    first = last * 0
    if C.HAS_LEFT:
        first = gl.minimum(gl.maximum(position - left, 0) // C.BLOCK_N, last - 1)
    return first, last


@gluon.jit
def load(descs, buffers, place, full, row, column, C: gl.constexpr):
    """A tile in its one or two parts; the caller has told `full` of the bytes."""
    tma.async_copy_global_to_shared(descs[0], [row, column], full, buffers[0].index(place))
    if C.REST > 0:
        tma.async_copy_global_to_shared(descs[1], [row, column + C.D], full, buffers[1].index(place))


@gluon.jit
def producer(descs, buffers, full, work, C: gl.constexpr):
    q_descs, k_descs, v_descs = descs
    q_s, k_s, v_s = buffers
    q_full, k_full, v_full = full
    items, schedule, n_heads, left, right = work
    THREADS: gl.constexpr = C.THREADS
    CONSUMERS: gl.constexpr = C.CONSUMERS
    loaded = 0
    number = 0
    first_piece, end_piece, step_piece = share(schedule, gl.load(items) * n_heads, C.SCHEDULED)
    for index in range(first_piece, end_piece, step_piece):
        head, row_q, n_q, row_k, n_k, position, _ = work_item(piece(schedule, index, C.SCHEDULED), items, n_heads)
        first, last = key_tiles(n_q, n_k, position, left, right, C)
        column = (head // C.GROUP) * C.WIDTH
        slot = number % C.Q_SLOTS
        if number >= C.Q_SLOTS:
            barrier_sync(C.Q_FREE + slot, THREADS, 1)
        mbarrier.expect(q_full.index(slot), C.BLOCK_M * C.WIDTH * 2)
        for consumer in gl.static_range(CONSUMERS):
            place = slot * CONSUMERS + consumer
            load(q_descs, q_s, place, q_full.index(slot), row_q + consumer * ROWS, head * C.WIDTH, C)
        for step in range(last - first):
            row = row_k + (last - 1 - step) * C.BLOCK_N
            stage = loaded % C.STAGES
            if loaded >= C.STAGES:
                barrier_sync(C.K_FREE + stage, THREADS, 1)
            mbarrier.expect(k_full.index(stage), C.BLOCK_N * C.WIDTH * 2)
            load(k_descs, k_s, stage, k_full.index(stage), row, column, C)
            if loaded >= C.STAGES:
                barrier_sync(C.V_FREE + stage, THREADS, 1)
            mbarrier.expect(v_full.index(stage), C.BLOCK_N * C.WIDTH * 2)
            load(v_descs, v_s, stage, v_full.index(stage), row, column, C)
            loaded += 1
        number += 1
    # take the last releases, so that no hardware barrier is left half full
    for release in range(number, number + C.Q_SLOTS):
        if release >= C.Q_SLOTS:
            barrier_sync(C.Q_FREE + release % C.Q_SLOTS, THREADS, 1)
    for release in range(loaded, loaded + C.STAGES):
        if release >= C.STAGES:
            barrier_sync(C.K_FREE + release % C.STAGES, THREADS, 1)
            barrier_sync(C.V_FREE + release % C.STAGES, THREADS, 1)


@gluon.jit
def capped(s, inner, cap):
    """cap * tanh(x) for inner * s = 2 x log2(e); tanh by an exponential, because tanh.approx is good to 11 bits."""
    return cap - 2.0 * cap * reciprocal(gl.exp2(s * inner) + 1.0)


@gluon.jit
def masked(s, tile, n_k, own, left, right, C: gl.constexpr):
    """Scores with -inf where a query does not see the key."""
    end = own * 0 + (n_k - 1)
    if C.HAS_RIGHT:
        end = gl.minimum(own + right, n_k - 1)
    start = tile * C.BLOCK_N
    return mask_rows(s, end - start, own - left - start, C.HAS_LEFT)


@gluon.jit
def issue_scores(q_s, place, k_s, stage, C: gl.constexpr):
    """Q K' of a tile, on its way."""
    N: gl.constexpr = C.BLOCK_N
    layout: gl.constexpr = C.scores
    s = gl.zeros([ROWS, N], gl.float32, layout)
    s = warpgroup_mma(q_s[0].index(place), k_s[0].index(stage).permute((1, 0)), s, use_acc=False, is_async=True)
    if C.REST > 0:
        s = warpgroup_mma(q_s[1].index(place), k_s[1].index(stage).permute((1, 0)), s, is_async=True)
    return s


@gluon.jit
def issue_out(p, v_s, stage, out, rest, C: gl.constexpr):
    """P V of a tile added to out, on its way."""
    p_out = gl.convert_layout(p, gl.DotOperandLayout(0, C.out, 2))
    out = warpgroup_mma(p_out, v_s[0].index(stage), out, is_async=True)
    if C.REST > 0:
        p_rest = gl.convert_layout(p, gl.DotOperandLayout(0, C.rest, 2))
        return out, warpgroup_mma(p_rest, v_s[1].index(stage), rest, is_async=True)
    else:
        return out, rest


@gluon.jit
def held(weights, dtype: gl.constexpr, C: gl.constexpr):
    """What is kept of the weights until P V: float32, or P where registers are scarce."""
    if C.CONSUMERS == 3:
        return narrow(weights, dtype)
    else:
        return weights


@gluon.jit
def operand(weights, dtype: gl.constexpr, C: gl.constexpr):
    """P of what `held` kept."""
    if C.CONSUMERS == 3:
        return weights
    else:
        return narrow(weights, dtype)


@gluon.jit
def wait_scores(s, C: gl.constexpr):
    """The scores, while P V of the tile before is still on its way."""
    return warpgroup_mma_wait(2 if C.REST > 0 else 1, deps=[s])


@gluon.jit
def wait_out(out, rest, C: gl.constexpr):
    if C.REST > 0:
        return warpgroup_mma_wait(0, deps=[out, rest])
    else:
        return warpgroup_mma_wait(0, deps=[out]), rest


@gluon.jit
def scaled(out, rest, factors, C: gl.constexpr):
    """out with each row multiplied by its factor."""
    out = scale_rows(out, factors)
    if C.REST > 0:
        rest = scale_rows(rest, factors)
    return out, rest


@gluon.jit
def store(corner, values, n_rows, stride, FIRST: gl.constexpr, N: gl.constexpr, layout: gl.constexpr, C: gl.constexpr):
    """Columns [FIRST, FIRST + N) of a consumer's rows of out, as far as there are such rows and columns."""
    rows = gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    columns = gl.arange(0, N, layout=gl.SliceLayout(0, layout)) + FIRST
    mask = (rows < n_rows)[:, None]
    if C.HEAD_DIM < FIRST + N:
        mask = mask & (columns < C.HEAD_DIM)[None, :]
    gl.store((corner + rows * stride)[:, None] + columns[None, :], values, mask=mask)


@gluon.jit
def consumer(which: gl.constexpr, results, buffers, full, work, numbers, C: gl.constexpr):
    o_descs, out_ptr, lse_ptr, stride_out, stride_lse = results
    q_s, k_s, v_s = buffers
    q_full, k_full, v_full = full
    items, schedule, n_heads, left, right = work
    scale, inner, cap, sinks = numbers
    dtype: gl.constexpr = q_s[0].dtype
    THREADS: gl.constexpr = C.THREADS
    MINE: gl.constexpr = C.TURN + which
    NEXT: gl.constexpr = C.TURN + (which + 1) % C.CONSUMERS
    D: gl.constexpr = C.D
    REST: gl.constexpr = C.REST if C.REST > 0 else 8
    out_layout: gl.constexpr = C.out
    rest_layout: gl.constexpr = C.rest
    rows = gl.arange(0, ROWS, layout=gl.SliceLayout(1, C.scores))
    stage = 0
    phase = 0
    number = 0
    if which == C.CONSUMERS - 1:
        barrier_arrive(C.TURN, "256", 4)
    thread_barrier()
    first_piece, end_piece, step_piece = share(schedule, gl.load(items) * n_heads, C.SCHEDULED)
    for index in range(first_piece, end_piece, step_piece):
        slot = number % C.Q_SLOTS
        place = slot * C.CONSUMERS + which
        _, _, n_q, _, n_k, position, _ = work_item(piece(schedule, index, C.SCHEDULED), items, n_heads)
        first, last = key_tiles(n_q, n_k, position, left, right, C)
        n_tiles = last - first
        low = position + which * ROWS
        own = rows + low
        full_last = n_k // C.BLOCK_N  # tiles [full_first, full_last) are seen by every query
        full_first = 0
        if C.HAS_RIGHT:
            full_last = gl.minimum(n_k, gl.maximum(low + right + 1, 0)) // C.BLOCK_N
        if C.HAS_LEFT:
            full_first = (gl.maximum(low + ROWS - 1 - left, 0) + C.BLOCK_N - 1) // C.BLOCK_N
        full_from = gl.minimum(gl.maximum(last - full_last, 1), n_tiles)
        full_to = gl.minimum(gl.maximum(last - full_first, full_from), n_tiles)
        out = gl.zeros([ROWS, D], gl.float32, out_layout)
        rest = gl.zeros([ROWS, REST], gl.float32, rest_layout)
        mbarrier.wait(q_full.index(slot), number // C.Q_SLOTS % 2)
        mbarrier.wait(k_full.index(stage), phase)
        s = warpgroup_mma_wait(0, deps=[issue_scores(q_s, place, k_s, stage, C)])
        barrier_arrive(C.K_FREE + stage, THREADS, 4)
        if C.HAS_CAP:
            s = capped(s, inner, cap)
        if (last > full_last) | (last <= full_first):
            s = masked(s, last - 1, n_k, own, left, right, C)
        m = gl.maximum(gl.max(partial_row_max(s), 1) * scale, FLOOR)
        m = gl.convert_layout(m, gl.SliceLayout(1, C.scores))
        alpha = gl.exp2(m - m)
        weights = gl.exp2(s * scale - m[:, None])
        total = partial_row_sums(weights)
        weights = held(weights, dtype, C)
        v_stage = stage
        v_phase = phase
        phase = gl.where(v_stage + 1 == C.STAGES, v_phase ^ 1, v_phase)
        stage = gl.where(v_stage + 1 == C.STAGES, 0, v_stage + 1)
        if (number > 0) & (C.Q_SLOTS > 1):  # out of the item before has left its slot by now
            tma.store_wait(0)
            barrier_arrive(C.Q_FREE + (number - 1) % C.Q_SLOTS, THREADS, 4)
        mbarrier.wait(k_full.index(stage), phase, pred=n_tiles > 1)
        LOOPS: gl.constexpr = 1 if C.ONE_LOOP else (3 if C.HAS_LEFT else 2)
        for part in gl.static_range(LOOPS):  # masked tiles, full ones, masked ones
            begin = 1 if part == 0 else (full_from if part == 1 else full_to)
            end = n_tiles if part == LOOPS - 1 else (full_from if part == 0 else full_to)
            for step in range(begin, end):
                barrier_sync(MINE, "256", 4)
                s_issued = issue_scores(q_s, place, k_s, stage, C)
                mbarrier.wait(v_full.index(v_stage), v_phase)
                out, rest = scaled(out, rest, alpha, C)
                out_issued, rest_issued = issue_out(operand(weights, dtype, C), v_s, v_stage, out, rest, C)
                barrier_arrive(NEXT, "256", 4)
                s = wait_scores(s_issued, C)
                barrier_arrive(C.K_FREE + stage, THREADS, 4)
                if C.HAS_CAP:
                    s = capped(s, inner, cap)
                if part != 1:
                    s = masked(s, last - 1 - step, n_k, own, left, right, C)
                largest = gl.convert_layout(gl.max(partial_row_max(s), 1), gl.SliceLayout(1, C.scores)) * scale
                m_new = gl.where(largest > m + SLACK, largest, m)
                alpha = gl.exp2(m - m_new)
                m = m_new
                out, rest = wait_out(out_issued, rest_issued, C)
                barrier_arrive(C.V_FREE + v_stage, THREADS, 4)
                weights = gl.exp2(s * scale - m[:, None])
                total = total * beside(alpha, total) + partial_row_sums(weights)
                weights = held(weights, dtype, C)
                v_stage = stage
                v_phase = phase
                phase = gl.where(v_stage + 1 == C.STAGES, v_phase ^ 1, v_phase)
                stage = gl.where(v_stage + 1 == C.STAGES, 0, v_stage + 1)
                mbarrier.wait(k_full.index(stage), phase, pred=step + 1 < n_tiles)
        mbarrier.wait(v_full.index(v_stage), v_phase)
        out, rest = scaled(out, rest, alpha, C)
        out_issued, rest_issued = issue_out(operand(weights, dtype, C), v_s, v_stage, out, rest, C)
        # read the item again: kept through the loop, its numbers would take registers
        head, row_q, n_q, _, _, _, row_lse = work_item(piece(schedule, index, C.SCHEDULED), items, n_heads)
        n_rows = n_q - which * ROWS
        row = row_q + which * ROWS
        sums = gl.convert_layout(gl.sum(total, 1), gl.SliceLayout(1, C.scores))
        of_keys = 1.0
        if C.HAS_SINKS:
            sink = gl.cast(gl.load(sinks + head), gl.float32) * LOG2E
            largest = gl.maximum(m, sink)
            of_keys = gl.exp2(m - largest)
            sums = sums * of_keys + gl.exp2(sink - largest)
            m = largest
        lse = (m + gl.log2(sums)) * LN2
        gl.store(lse_ptr + (head * stride_lse + row_lse + which * ROWS + rows), lse, mask=rows < n_rows)
        inverse = gl.where(sums > 0, of_keys / sums, 0.0)
        out, rest = wait_out(out_issued, rest_issued, C)
        barrier_arrive(C.V_FREE + v_stage, THREADS, 4)
        out, rest = scaled(out, rest, inverse, C)
        if (n_rows >= ROWS) & (C.HEAD_DIM == C.WIDTH):  # by TMA, through the buffer of Q, which nobody reads any more
            q_s[0].index(place).store(narrow(out, dtype))
            if C.REST > 0:
                q_s[1].index(place).store(narrow(rest, dtype))
            fence_async_shared()
            thread_barrier()
            tma.async_copy_shared_to_global(o_descs[0], [row, head * C.WIDTH], q_s[0].index(place))
            if C.REST > 0:
                tma.async_copy_shared_to_global(o_descs[1], [row, head * C.WIDTH + C.D], q_s[1].index(place))
        elif n_rows > 0:
            corner = out_ptr + (gl.cast(row, gl.int64) * stride_out + head * C.HEAD_DIM)
            store(corner, narrow(out, dtype), n_rows, stride_out, 0, D, out_layout, C)
            if C.REST > 0:
                store(corner, narrow(rest, dtype), n_rows, stride_out, D, REST, rest_layout, C)
        if C.Q_SLOTS == 1:
            tma.store_wait(0)
            barrier_arrive(C.Q_FREE, THREADS, 4)
        number = number + 1
    tma.store_wait(0)
    if (number > 0) & (C.Q_SLOTS > 1):
        barrier_arrive(C.Q_FREE + (number - 1) % C.Q_SLOTS, THREADS, 4)
    if which == 0:
        barrier_sync(C.TURN, "256", 4)


@gluon.jit
def consumer_0(results, buffers, full, work, numbers, C: gl.constexpr):
    consumer(0, results, buffers, full, work, numbers, C)


@gluon.jit
def consumer_1(results, buffers, full, work, numbers, C: gl.constexpr):
    consumer(1, results, buffers, full, work, numbers, C)


@gluon.jit
def consumer_2(results, buffers, full, work, numbers, C: gl.constexpr):
    consumer(2, results, buffers, full, work, numbers, C)


@gluon.jit
def allocate(desc, rest_desc, count: gl.constexpr, n_rows: gl.constexpr, C: gl.constexpr):
    """`count` buffers of n_rows rows, in their one or two parts."""
    first = gl.allocate_shared_memory(desc.dtype, [count, n_rows, C.D], desc.layout)
    if C.REST > 0:
        return first, gl.allocate_shared_memory(desc.dtype, [count, n_rows, C.REST], rest_desc.layout)
    else:
        return first, first


@gluon.jit
def full_barriers(count: gl.constexpr):
    barriers = gl.allocate_shared_memory(gl.int64, [count, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(count):
        mbarrier.init(barriers.index(i), count=1)
    return barriers


@gluon.jit(do_not_specialize=["left", "right"])
def attention_forward_kernel(q_desc, k_desc, v_desc, o_desc, q_rest, k_rest, v_rest, o_rest, out, lse, sinks,
                             items, schedule, n_heads, left, right, scale, inner, cap, stride_out, stride_lse,
                             CONSUMERS: gl.constexpr, BLOCK_N: gl.constexpr, D: gl.constexpr, REST: gl.constexpr,
                             STAGES: gl.constexpr, Q_SLOTS: gl.constexpr, HEAD_DIM: gl.constexpr, GROUP: gl.constexpr,
                             SCHEDULED: gl.constexpr, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr,
                             HAS_CAP: gl.constexpr, HAS_SINKS: gl.constexpr, ONE_LOOP: gl.constexpr):  # fmt: skip
    C: gl.constexpr = variant(CONSUMERS, BLOCK_N, D, REST, STAGES, Q_SLOTS, HEAD_DIM, GROUP,
                              SCHEDULED, HAS_LEFT, HAS_RIGHT, HAS_CAP, HAS_SINKS, ONE_LOOP)  # fmt: skip
    results = ((o_desc, o_rest), out, lse, stride_out, stride_lse)
    buffers = (
        allocate(q_desc, q_rest, Q_SLOTS * CONSUMERS, ROWS, C),
        allocate(k_desc, k_rest, STAGES, BLOCK_N, C),
        allocate(v_desc, v_rest, STAGES, BLOCK_N, C),
    )
    full = (full_barriers(Q_SLOTS), full_barriers(STAGES), full_barriers(STAGES))
    work = (items, schedule, n_heads, left, right)
    numbers = (scale, inner, cap, sinks)
    descs = ((q_desc, q_rest), (k_desc, k_rest), (v_desc, v_rest))
    if CONSUMERS == 2:
        gl.warp_specialize([
            (consumer_0, (results, buffers, full, work, numbers, C)),
            (consumer_1, (results, buffers, full, work, numbers, C)),
            (producer, (descs, buffers, full, work, C)),
        ], [4, 1], [240, 24])  # fmt: skip
    else:
        gl.warp_specialize([
            (consumer_0, (results, buffers, full, work, numbers, C)),
            (consumer_1, (results, buffers, full, work, numbers, C)),
            (consumer_2, (results, buffers, full, work, numbers, C)),
            (producer, (descs, buffers, full, work, C)),
        ], [4, 4, 1], [160, 160, 24])  # fmt: skip


class _Plan:
    """What the calls of one kind have in common on the host's side.

    documents: of packed input, None of dense. table, schedule: of dense input, None of packed.
    """

    def __init__(self, q_shape, k_shape, dtype, device, multiprocessors, documents, has_sinks, params):
        *leading, heads, head_dim = q_shape
        self.size = size = tile_size(head_dim)
        dense = documents is None
        config = forward_config(size, params.causal, q_shape[1] if dense else params.max_seqlen_q)
        self.block_m = block_m = ROWS.value * config.CONSUMERS
        self.table = self.schedule = None
        if dense:
            self.bound = q_shape[0] * launch.cdiv(q_shape[1], block_m)
        else:
            self.bound = packed_bound(q_shape[0], documents, block_m)
        programs = min(self.bound * heads, multiprocessors)
        window = params.window_left, params.window_right
        if dense:
            self.table = dense_query_table(*q_shape[:2], k_shape[1], heads, block_m, device)
            self.schedule = dense_schedule(q_shape, k_shape, block_m, config.BLOCK_N, window, programs, device)
        self.lse_shape = (*leading[:-1], heads, leading[-1])
        tile = config.D, config.REST
        self.q_tiles = RowTiles((*q_shape[:-1], size), dtype, ROWS.value, *tile)
        self.k_tiles = RowTiles((*k_shape[:-1], size), dtype, config.BLOCK_N, *tile)
        scale, inner, cap = params.softmax_scale * LOG2E.value, 0.0, params.softcap * LOG2E.value
        if cap:  # capped scores are powers of two already
            scale, inner = 1.0, 2 * params.softmax_scale * LOG2E.value / params.softcap
        self.launch = launch.Prepared(
            (programs,), heads, *window, scale, inner, cap, heads * head_dim, leading[-1],
            **vars(config), HEAD_DIM=head_dim, GROUP=heads // k_shape[-2],
            SCHEDULED=dense, HAS_LEFT=window[0] >= 0, HAS_RIGHT=window[1] >= 0, HAS_CAP=cap > 0,
            HAS_SINKS=has_sinks, ONE_LOOP=one_loop(params.window_left), num_warps=4,
        )  # fmt: skip


_plan = functools.lru_cache(maxsize=256)(_Plan)


def forward(q, k, v, cu_seqlens_q, cu_seqlens_k, sinks, alibi_slopes, dropout_seed, params):
    """out and lse of the contract; tensors as `refuses` lets them through."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if q.numel() == 0:
        return out, empty_lse(q)
    if k.numel() == 0:
        return out.zero_(), lse_of_no_keys(q, sinks)
    documents = None if cu_seqlens_q is None else cu_seqlens_q.numel() - 1
    on = q.dtype, q.device, launch.multiprocessors(q)
    plan = _plan(q.shape, k.shape, *on, documents, sinks is not None, params)
    lse = torch.empty(plan.lse_shape, dtype=torch.float32, device=q.device)
    items, schedule = plan.table, plan.schedule
    if items is None:
        schedule = items = packed_query_table(cu_seqlens_q, cu_seqlens_k, q.shape[0], plan.bound, plan.block_m)
    q, k, v = (pad_heads(each, plan.size) for each in (q, k, v))
    (q_desc, q_rest), (k_desc, k_rest), (v_desc, v_rest) = plan.q_tiles.of(q), plan.k_tiles.of(k), plan.k_tiles.of(v)
    # padded, out does not leave by TMA
    o_desc, o_rest = plan.q_tiles.of(out) if out.shape == q.shape else (q_desc, q_rest)
    with launch.on_device(q):
        plan.launch.run(
            attention_forward_kernel, q_desc, k_desc, v_desc, o_desc, q_rest, k_rest, v_rest, o_rest,
            out, lse, sinks, items, schedule,
        )  # fmt: skip
    return out, lse
