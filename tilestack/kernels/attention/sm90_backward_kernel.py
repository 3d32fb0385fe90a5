"""Attention backward for Hopper, in Gluon.

An item is BLOCK_N keys of one document, one key head and HEADS of its query heads. A program takes one item, keeps dK
and dV in registers and walks over the query blocks that see its keys:

    S' = K Q',  P' = exp2(S' scale - lse),  dP' = V dO',  dS' = P' (dP' - delta),
    dV += P' dO,  dK += dS' Q,  dQ += dS K

* Partitions: two consumer warpgroups and one producer warp (TMA: Q with lse, dO with delta, through rings). Up to 128
  columns each consumer has 64 keys for S', dP', dK and dV, and half of D (or of the queries) for dQ, so that dQ is one
  sum over all keys of the item; P' and dS' stay in registers as left operands, dS' also goes through shared memory for
  dQ. Wider heads have 64 keys an item: the consumers share the queries of S', dP' and the columns of dK, dV, dQ, and P'
  and dS' go through shared memory.
* S' of the next query block is issued between dQ and dK of this one. Where registers allow (CARRY) dK runs beside the
  exponentials of the next block; elsewhere dQ leaves before dK is issued, while S' runs: the tensor cores have work. P'
  is kept as 16 bits, as eager attention has it: its float32 would take the registers of the next S'.
* At D = 128 shared memory sets the pace, by count: for a block of 64 queries wgmma reads 256 KB of operands there, and
  Q, dO, dS' and dQ move 112 KB more, at 128 bytes a cycle 2,900 cycles (the tensor cores are busy for 2,560). Long
  sequences run at an H100's limit of power: cycles that are saved become less than as much time.
* APART (D = 64 and 128): each warpgroup hands its part of dQ to one more warp, which adds it, and waits for that warp
  alone. The stores of dQ are fenced and handed over only once the exponentials of the next block have run: a fence at
  once waits for them, and all that follows with it, while the tensor cores run dry. Where registers allow (CARRY) lse
  and delta are read before products are issued whose operands would delay them.
* dQ is added into a float32 scratch tensor by TMA, from shared memory in an order free of bank conflicts, or, where no
  shared memory is left (DQ_SHARED), straight from the registers, 16 bytes at once. `finish_kernel` rounds it. Where the
  query heads of a key head are spread over several items, dK and dV are added from the registers too. Additions from
  several items come in any order: the last bits may differ from run to run.
* DETERMINISTIC: the items that see a block of queries add to it in turn. Items of later keys start and add first, and
  each walks from its first query to the last: under a causal mask it meets a block of queries BLOCK_N / BLOCK_M blocks
  after the item before it, which has added its part by then. These are the shortest items first, so the last section
  goes the other way round, lest the longest end alone: items of earlier keys first, from the last query to the first.
  Nobody waits for an item that starts later. The warp that adds dQ waits for the turn in the consumers' stead; it looks
  for the next turn while the block that it adds is on its way.
* Head dimensions 96 and 192 are tiles of 64 + 32 and 128 + 64 columns (D + TAIL).
* Items go in sections whose Q, dO and dQ fit into L2 together, and longest first within a section.

A row that sees no key has lse = inf (sm90_backward.py): its probabilities are 0 without a mask.
"""

from __future__ import annotations

from tilestack.kernels._gluon import (
    async_copy,
    barrier_arrive,
    barrier_sync,
    fence_async_shared,
    gl,
    gluon,
    group_barrier_arrive,
    group_barrier_sync,
    mbarrier,
    narrow,
    pass_turn,
    read_turn,
    reciprocal,
    reduce_add,
    thread_barrier,
    tma,
    tma_reduce_add,
    wait_for_turn,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
    widen,
)
from tilestack.kernels.attention.sm90_schedule import FIELDS

Q_FREE = gl.constexpr(6)  # hardware barriers: + stage
DO_FREE = gl.constexpr(9)  # + stage
DQ_FULL = gl.constexpr(12)  # + warpgroup, where each hands over its own part
DQ_FREE = gl.constexpr(14)


@gluon.jit
def key_item(items, n_columns, section, left, right, HEADS: gl.constexpr, GROUP: gl.constexpr, BLOCK_M: gl.constexpr,
             BLOCK_N: gl.constexpr, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr,
             DETERMINISTIC: gl.constexpr):  # fmt: skip
    """This program's item: (its document's first key row, keys, first query row, queries, first query block; the item's
    block of keys, its key head, its first query head, its query blocks [low, high), whether it walks from low to high,
    its own index over the documents).

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
    rising = n >= 0
    if DETERMINISTIC:
        rising = (pid // n_columns - in_document + n_blocks < gl.load(items)) | (begun * section + section < n_columns)
        n = gl.where(rising, n_blocks - 1 - n, n)
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
    return row_k, n_k, row_q, n_q, first_block, n, kv_head, head, low, gl.maximum(high, low), rising, index


@gluon.jit
def query_block(it, low, high, rising):
    """Iteration `it` of an item as (its query head among the item's, block of queries)."""
    steps = gl.maximum(high - low, 1)
    g = it // steps
    return g, gl.where(rising, low + it - g * steps, high - 1 - (it - g * steps))


@gluon.jit
def walk(low, high, rising):
    """(first, last, step) of an item's way over its query blocks [low, high)."""
    return gl.where(rising, low, high - 1), gl.where(rising, high - 1, low), gl.where(rising, 1, -1)


@gluon.jit
def load_rows(desc, tail_desc, row, column, barrier, buffer, tail_buffer, D: gl.constexpr, TAIL: gl.constexpr):
    tma.async_copy_global_to_shared(desc, [row, column], barrier, buffer)
    if TAIL:
        tma.async_copy_global_to_shared(tail_desc, [row, column + D], barrier, tail_buffer)


@gluon.jit
def load_scalars(pointer, rows_left, barrier, buffer, BLOCK_M: gl.constexpr):
    """lse or delta of a block's queries; TMA cannot: they begin at no multiple of 16 bytes."""
    rows = gl.arange(0, BLOCK_M, layout=gl.BlockedLayout([1], [32], [1], [0]))
    async_copy.async_copy_global_to_shared(buffer, pointer + rows, mask=rows < rows_left)  # 0 for the others
    async_copy.mbarrier_arrive(barrier, increment_count=False)


@gluon.jit
def producer(q_desc, k_desc, v_desc, do_desc, q_tail_desc, k_tail_desc, v_tail_desc, do_tail_desc, lse_ptr, delta_ptr,
             q_s, k_s, v_s, do_s, q_tail_s, k_tail_s, v_tail_s, do_tail_s, lse_s, delta_s,
             kv_full, q_full, do_full, items, n_columns, section, total_q, left, right,
             HEADS: gl.constexpr, GROUP: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, D: gl.constexpr,
             TAIL: gl.constexpr, STAGES: gl.constexpr, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr,
             DETERMINISTIC: gl.constexpr):  # fmt: skip
    row_k, _, row_q, n_q, _, n, kv_head, head, low, high, rising, _ = key_item(
        items, n_columns, section, left, right, HEADS, GROUP, BLOCK_M, BLOCK_N, HAS_LEFT, HAS_RIGHT, DETERMINISTIC
    )
    width: gl.constexpr = D + TAIL
    q_bytes: gl.constexpr = BLOCK_M * width * 2
    total = (high - low) * HEADS
    mbarrier.expect(kv_full, 2 * BLOCK_N * width * 2)
    row = row_k + n * BLOCK_N
    load_rows(k_desc, k_tail_desc, row, kv_head * width, kv_full, k_s.index(0), k_tail_s.index(0), D, TAIL)
    load_rows(v_desc, v_tail_desc, row, kv_head * width, kv_full, v_s.index(0), v_tail_s.index(0), D, TAIL)
    for it in range(total):
        g, m = query_block(it, low, high, rising)
        stage = it % STAGES
        row = row_q + m * BLOCK_M
        column = (head + g) * width
        scalars = (head + g) * total_q + row
        rows_left = n_q - m * BLOCK_M
        if it >= STAGES:
            barrier_sync(Q_FREE + stage, "288", 1)
        full = q_full.index(stage)
        mbarrier.expect(full, q_bytes)
        load_rows(q_desc, q_tail_desc, row, column, full, q_s.index(stage), q_tail_s.index(stage), D, TAIL)
        load_scalars(lse_ptr + scalars, rows_left, full, lse_s.index(stage), BLOCK_M)
        if it >= STAGES:
            barrier_sync(DO_FREE + stage, "288", 1)
        full = do_full.index(stage)
        mbarrier.expect(full, q_bytes)
        load_rows(do_desc, do_tail_desc, row, column, full, do_s.index(stage), do_tail_s.index(stage), D, TAIL)
        load_scalars(delta_ptr + scalars, rows_left, full, delta_s.index(stage), BLOCK_M)
    # take the last releases, so that no hardware barrier is left half full
    for it in range(total, total + STAGES):
        if it >= STAGES:
            barrier_sync(Q_FREE + it % STAGES, "288", 1)
            barrier_sync(DO_FREE + it % STAGES, "288", 1)


@gluon.jit
def add_dq(desc, tail_desc, buffer, tail_buffer, row, D: gl.constexpr, TAIL: gl.constexpr):
    tma_reduce_add(desc, [0, row, 0], buffer)
    if TAIL:
        tma_reduce_add(tail_desc, [D // 32, row, 0], tail_buffer)


@gluon.jit
def dq_turn(it, turns, n_q, n_k, first_block, n, head, low, high, rising, n_q_blocks, left, right,
            BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, HAS_LEFT: gl.constexpr,
            HAS_RIGHT: gl.constexpr):  # fmt: skip
    """Of iteration `it`: the counter of the turns of its block of dQ, and the item's turn."""
    g, m = query_block(it, low, high, rising)
    first = n * 0  # blocks of keys that see the queries
    last = (n_k + BLOCK_N - 1) // BLOCK_N - 1
    if HAS_LEFT:
        first = gl.maximum(m * BLOCK_M + n_k - n_q - left, 0) // BLOCK_N
    if HAS_RIGHT:
        last = gl.minimum(last, (m * BLOCK_M + BLOCK_M - 1 + n_k - n_q + right) // BLOCK_N)
    return turns + ((head + g) * n_q_blocks + first_block + m), gl.where(rising, last - n, n - first)


@gluon.jit
def dq_writer(dq_desc, dq_tail_desc, dq_s, dq_tail_s, turns, items, n_columns, section, n_q_blocks, total_q,
              left, right, HEADS: gl.constexpr, GROUP: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
              D: gl.constexpr, TAIL: gl.constexpr, APART: gl.constexpr, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr,
              DETERMINISTIC: gl.constexpr):  # fmt: skip
    """Adds the consumers' blocks of dQ to global memory; DETERMINISTIC: each in its turn.

    ptxas sees that its numbers are the same in every lane, which takes none of the few registers of a thread: so they
    are worked out again rather than carried."""
    PARTS: gl.constexpr = 2 if APART else 1
    THREADS: gl.constexpr = "160" if APART else "288"  # that meet at a part's barriers
    _, n_k, row_q, n_q, first_block, n, _, head, low, high, rising, _ = key_item(
        items, n_columns, section, left, right, HEADS, GROUP, BLOCK_M, BLOCK_N, HAS_LEFT, HAS_RIGHT, DETERMINISTIC
    )
    total = (high - low) * HEADS
    if total > 0:
        for part in gl.static_range(PARTS):
            barrier_arrive(DQ_FREE + part + 0 * total, THREADS, 1)
        if DETERMINISTIC:
            counter, turn = dq_turn(
                0, turns, n_q, n_k, first_block, n, head, low, high, rising, n_q_blocks, left, right,
                BLOCK_M, BLOCK_N, HAS_LEFT, HAS_RIGHT,
            )  # fmt: skip
            wait_for_turn(counter, turn, 1)
    for it in range(total):
        g, m = query_block(it, low, high, rising)
        row = (head + g) * total_q + row_q + m * BLOCK_M
        for part in gl.static_range(PARTS):
            barrier_sync(DQ_FULL + part + 0 * it, THREADS, 1)
            if not APART:
                add_dq(dq_desc, dq_tail_desc, dq_s, dq_tail_s, row, D, TAIL)
            elif BLOCK_M == 128:  # half the queries
                tma_reduce_add(dq_desc, [0, row + 64 * part, 0], dq_s.index(part))
            else:  # half the columns
                tma_reduce_add(dq_desc, [part * (D // 64), row, 0], dq_s.index(part))
        if DETERMINISTIC:
            counter, _ = dq_turn(
                it, turns, n_q, n_k, first_block, n, head, low, high, rising, n_q_blocks, left, right,
                BLOCK_M, BLOCK_N, HAS_LEFT, HAS_RIGHT,
            )  # fmt: skip
            following, turn = dq_turn(
                gl.minimum(it + 1, total - 1),
                turns, n_q, n_k, first_block, n, head, low, high, rising, n_q_blocks, left, right,
                BLOCK_M, BLOCK_N, HAS_LEFT, HAS_RIGHT,
            )  # fmt: skip
            reached = read_turn(following, 1)
        for part in gl.static_range(PARTS):
            tma.store_wait(PARTS - 1 - part)
            barrier_arrive(DQ_FREE + part + 0 * it, THREADS, 1)
        if DETERMINISTIC:
            pass_turn(counter, 1)
            if it + 1 < total:
                wait_for_turn(following, turn, 1, reached)


@gluon.jit
def store_rows(pointer, value, row, column, rows_left, stride, layout: gl.constexpr):
    """Write a tile of which rows_left rows exist."""
    rows = gl.arange(0, value.shape[0], layout=gl.SliceLayout(1, layout))
    columns = gl.arange(0, value.shape[1], layout=gl.SliceLayout(0, layout))
    corner = gl.cast(row, gl.int64) * stride + column
    places = (rows * stride)[:, None] + columns[None, :]
    gl.store(pointer + corner + places, value, mask=(rows < rows_left)[:, None])


@gluon.jit
def store_tile(desc, pointer, value, staging, row, column, rows_left, stride, layout: gl.constexpr):
    """The same, through TMA when all rows exist."""
    if rows_left >= value.shape[0]:
        staging.store(value)
        fence_async_shared()
        thread_barrier()
        tma.async_copy_shared_to_global(desc, [row, column], staging)
    else:
        store_rows(pointer, value, row, column, rows_left, stride, layout)


@gluon.jit
def sum_places(WIDTH: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr, layout: gl.constexpr):
    """Where an accumulator's values lie in a scratch tensor: each 16 columns in the order of a thread's registers."""
    rows = gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    columns = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, layout))
    places = columns // 16 * 16 + columns // 2 % 4 * 4 + columns // 8 % 2 * 2 + columns % 2
    return (rows * WIDTH)[:, None] + places[None, :]


@gluon.jit
def in_lines(x, ROWS: gl.constexpr, COLUMNS: gl.constexpr):
    """An accumulator as TMA adds it to a scratch tensor: each 32 columns of 64 rows in that order, rows last."""
    x = gl.permute(gl.reshape(x, [ROWS // 64, 64, COLUMNS // 32, 4, 4, 2]), [0, 2, 1, 4, 3, 5])
    return gl.reshape(x, [ROWS * COLUMNS // 2048, 64, 32])


@gluon.jit
def product(a, b, a_tail, b_tail, zeros, TAIL: gl.constexpr):
    """Issue a b over D, then over the TAIL."""
    issued = warpgroup_mma(a, b, zeros, use_acc=False, is_async=True)
    if TAIL:
        issued = warpgroup_mma(a_tail, b_tail, issued, is_async=True)
    return issued


@gluon.jit
def consumers(dq_desc, dq_tail_desc, dk_desc, dv_desc, dk_ptr, dv_ptr, dq_sum, dk_sum, dv_sum, turns,
              q_s, k_s, v_s, do_s, q_tail_s, k_tail_s, v_tail_s, do_tail_s,
              lse_s, delta_s, p_s, ds_s, dq_s, dq_tail_s,
              kv_full, q_full, do_full, items, n_columns, section, n_q_blocks, total_q, total_k,
              left, right, scale, scale2, softcap2, stride_dk,
              HEADS: gl.constexpr, GROUP: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, D: gl.constexpr,
              TAIL: gl.constexpr, STAGES: gl.constexpr, CARRY: gl.constexpr, DQ_SHARED: gl.constexpr,
              APART: gl.constexpr, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, HAS_SOFTCAP: gl.constexpr,
              DETERMINISTIC: gl.constexpr):  # fmt: skip
    wide: gl.constexpr = 128 // BLOCK_N  # warpgroups side by side over the queries of S', dP' and the D of dK, dV
    across: gl.constexpr = 128 // BLOCK_M  # and over the D of dQ
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8 // wide, wide], [16, BLOCK_M // wide, 16])
    kv_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8 // wide, wide], [16, D // wide, 16])
    dq_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8 // across, across], [16, D // across, 16])
    left_operand: gl.constexpr = gl.DotOperandLayout(0, kv_layout, 2)
    groups: gl.constexpr = 2 if TAIL else 1  # of wgmma in a product
    EARLY: gl.constexpr = APART and CARRY  # lse and delta are read before the products that would delay them
    dq_first: gl.constexpr = wide == 1 and DQ_SHARED and not CARRY and not TAIL  # dQ leaves before dK is issued
    of_query: gl.constexpr = gl.SliceLayout(0, s_layout)
    dtype: gl.constexpr = q_s.dtype
    _, n_k, row_q, n_q, _, n, _, head, low, high, rising, _ = key_item(
        items, n_columns, section, left, right, HEADS, GROUP, BLOCK_M, BLOCK_N, HAS_LEFT, HAS_RIGHT, DETERMINISTIC
    )
    shift = n_k - n_q
    total = (high - low) * HEADS
    zeros = gl.zeros([BLOCK_N, BLOCK_M], gl.float32, s_layout)
    dq_zeros = gl.zeros([BLOCK_M, D], gl.float32, dq_layout)
    dk_issued = warpgroup_mma_init(gl.zeros([BLOCK_N, D], gl.float32, kv_layout))
    dv = gl.zeros([BLOCK_N, D], gl.float32, kv_layout)
    dq_places = sum_places(D + TAIL, BLOCK_M, D, dq_layout)
    if TAIL:
        kv_tail_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8 // wide, wide], [16, TAIL // wide, 16])
        dq_tail_layout: gl.constexpr = gl.NVMMADistributedLayout(
            [3, 0], [8 // across, across], [16, TAIL // across, 16]
        )
        left_tail_operand: gl.constexpr = gl.DotOperandLayout(0, kv_tail_layout, 2)
        dq_tail_zeros = gl.zeros([BLOCK_M, TAIL], gl.float32, dq_tail_layout)
        dk_tail_issued = warpgroup_mma_init(gl.zeros([BLOCK_N, TAIL], gl.float32, kv_tail_layout))
        dv_tail = gl.zeros([BLOCK_N, TAIL], gl.float32, kv_tail_layout)
        dq_tail_places = sum_places(D + TAIL, BLOCK_M, TAIL, dq_tail_layout)
    # query i sees key j if first_seen[j] <= i <= last_seen[j]; query blocks [masked_below, masked_from) see all keys
    keys = n * BLOCK_N + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, s_layout))
    queries = gl.arange(0, BLOCK_M, layout=of_query)
    first_seen = gl.where(keys < n_k, keys - (shift + right) if HAS_RIGHT else 0, 1 << 30)
    last_seen = keys + (left - shift)
    masked_below = low
    masked_from = n_q // BLOCK_M
    if HAS_RIGHT:
        masked_below = (gl.maximum(n * BLOCK_N + BLOCK_N - 1 - shift - right, 0) + BLOCK_M - 1) // BLOCK_M
    if HAS_LEFT:
        masked_from = gl.minimum(masked_from, gl.maximum(n * BLOCK_N + left - shift + 1, 0) // BLOCK_M)
    masked_below = gl.where(n * BLOCK_N + BLOCK_N > n_k, high, masked_below)
    stage = 0
    phase = 0
    if DETERMINISTIC:
        begin, end, step = walk(low, high, rising)
    _, m = query_block(0, low, high, rising)
    mbarrier.wait(kv_full, 0)
    mbarrier.wait(q_full.index(0), 0, pred=total > 0)
    thread_barrier()
    s_issued = product(k_s.index(0), q_s.index(0).permute((1, 0)), k_tail_s.index(0),
                       q_tail_s.index(0).permute((1, 0)), zeros, TAIL)  # fmt: skip
    s = warpgroup_mma_wait(0, deps=[s_issued])
    for it in range(total):
        # an index that is always 0 and that the compiler cannot know: loop-invariant descriptors would take registers
        zero = it >> 30
        k = k_s.index(zero)
        ds_tile = ds_s.index(zero)
        do = do_s.index(stage)
        if EARLY:
            lse = lse_s.index(stage).load(of_query)
        mbarrier.wait(do_full.index(stage), phase)
        dp_issued = product(v_s.index(zero), do.permute((1, 0)), v_tail_s.index(zero),
                            do_tail_s.index(stage).permute((1, 0)), zeros, TAIL)  # fmt: skip
        if not EARLY:
            lse = lse_s.index(stage).load(of_query)
        if HAS_SOFTCAP:
            tanh = 1.0 - 2.0 * reciprocal(1.0 + gl.exp2(s * scale2))
            p = gl.exp2(tanh * softcap2 - lse[None, :])
        else:
            p = gl.exp2(s * scale2 - lse[None, :])
        if (m < masked_below) | (m >= masked_from):
            own = queries + m * BLOCK_M
            seen = first_seen[:, None] <= gl.where(own < n_q, own, -(1 << 30))[None, :]
            if HAS_LEFT:
                seen = seen & (last_seen[:, None] >= own[None, :])
            p = gl.where(seen, p, 0.0)
        if APART and it > 0:  # not earlier: the fence waits for the stores, beside which the exponentials ran
            fence_async_shared()
            group_barrier_arrive(DQ_FULL + zero, "160", 8)  # the previous dQ is there
        if CARRY:
            if TAIL:
                dk_done, dk_tail_done = warpgroup_mma_wait(groups, deps=[dk_issued, dk_tail_issued])
            else:
                dk_done = warpgroup_mma_wait(groups, deps=[dk_issued])
            if it > 0:
                barrier_arrive(Q_FREE + (stage + STAGES - 1) % STAGES, "288", 8)
        else:
            dk_done = dk_issued
            if TAIL:
                dk_tail_done = dk_tail_issued
        weights = narrow(p, dtype)
        if EARLY:
            delta = delta_s.index(stage).load(of_query)
        slope = narrow(p * (1.0 - tanh * tanh), dtype) if HAS_SOFTCAP else weights
        if wide == 1:
            dv_issued = warpgroup_mma(gl.convert_layout(weights, left_operand), do, dv, is_async=True)
            if TAIL:
                weights_tail = gl.convert_layout(weights, left_tail_operand)
                dv_tail_issued = warpgroup_mma(weights_tail, do_tail_s.index(stage), dv_tail, is_async=True)
        if not EARLY:
            delta = delta_s.index(stage).load(of_query)
        dp = warpgroup_mma_wait(groups if wide == 1 else 0, deps=[dp_issued])
        ds = narrow(widen(slope, dtype) * (dp - delta[None, :]), dtype)
        if wide == 2 or not DQ_SHARED or APART:
            thread_barrier()  # both warpgroups have read the previous dS'
        ds_tile.store(ds)
        if wide == 2:
            p_tile = p_s.index(zero)
            p_tile.store(weights)
        fence_async_shared()
        # after the last block this one again, for nothing: a branch around wgmma costs more
        following = gl.where(stage + 1 == STAGES, 0, stage + 1)
        next_phase = gl.where(it + 1 == total, phase, gl.where(stage + 1 == STAGES, phase ^ 1, phase))
        next_stage = gl.where(it + 1 == total, stage, following)
        if DQ_SHARED and not DETERMINISTIC and not APART:
            tma.store_wait(0)  # the previous dQ has left shared memory
        thread_barrier()  # dS' (and P') of both warpgroups is there
        if wide == 2:
            dv_issued = warpgroup_mma(p_tile, do, dv, is_async=True)
            if TAIL:
                dv_tail_issued = warpgroup_mma(p_tile, do_tail_s.index(stage), dv_tail, is_async=True)
        dq_issued = warpgroup_mma(ds_tile.permute((1, 0)), k, dq_zeros, use_acc=False, is_async=True)
        if TAIL:
            k_tail = k_tail_s.index(zero)
            dq_tail_issued = warpgroup_mma(ds_tile.permute((1, 0)), k_tail, dq_tail_zeros, use_acc=False, is_async=True)
        if wide == 1:
            if TAIL:
                dv, dv_tail = warpgroup_mma_wait(groups, deps=[dv_issued, dv_tail_issued])
            else:
                dv = warpgroup_mma_wait(groups, deps=[dv_issued])
            barrier_arrive(DO_FREE + stage, "288", 8)
        mbarrier.wait(q_full.index(next_stage), next_phase)
        s_issued = product(k, q_s.index(next_stage).permute((1, 0)), k_tail_s.index(zero),
                           q_tail_s.index(next_stage).permute((1, 0)), zeros, TAIL)  # fmt: skip
        if wide == 1 and not dq_first:
            dk_issued = warpgroup_mma(gl.convert_layout(ds, left_operand), q_s.index(stage), dk_done, is_async=True)
            if TAIL:
                ds_left = gl.convert_layout(ds, left_tail_operand)
                dk_tail_issued = warpgroup_mma(ds_left, q_tail_s.index(stage), dk_tail_done, is_async=True)
        elif wide == 2:
            dk_issued = warpgroup_mma(ds_tile, q_s.index(stage), dk_done, is_async=True)
            if TAIL:
                dk_tail_issued = warpgroup_mma(ds_tile, q_tail_s.index(stage), dk_tail_done, is_async=True)
        if wide == 2:
            if TAIL:
                dv, dv_tail = warpgroup_mma_wait(3 * groups, deps=[dv_issued, dv_tail_issued])
            else:
                dv = warpgroup_mma_wait(3 * groups, deps=[dv_issued])
            barrier_arrive(DO_FREE + stage, "288", 8)
        if dq_first:
            dq = warpgroup_mma_wait(1, deps=[dq_issued])
        elif TAIL:
            dq, dq_tail, s = warpgroup_mma_wait(groups, deps=[dq_issued, dq_tail_issued, s_issued])
        else:
            dq, s = warpgroup_mma_wait(groups, deps=[dq_issued, s_issued])
        if APART:
            group_barrier_sync(DQ_FREE + zero, "160", 8)  # this warpgroup's previous part has left
            lines: gl.constexpr = D * BLOCK_M // 2048
            dq_s._reinterpret(gl.float32, [lines, 64, 32], dq_desc.layout).store(in_lines(dq, BLOCK_M, D))
            if dq_first:
                dk_issued = warpgroup_mma(gl.convert_layout(ds, left_operand), q_s.index(stage), dk_done, is_async=True)
        elif DQ_SHARED:
            if DETERMINISTIC:
                barrier_sync(DQ_FREE + zero, "288", 8)  # the previous dQ has left, and both warpgroups have read dS'
            dq_s.store(in_lines(dq, BLOCK_M, D))
            if TAIL:
                dq_tail_s.store(in_lines(dq_tail, BLOCK_M, TAIL))
            fence_async_shared()
            if dq_first:
                dk_issued = warpgroup_mma(gl.convert_layout(ds, left_operand), q_s.index(stage), dk_done, is_async=True)
            if DETERMINISTIC:
                barrier_arrive(DQ_FULL + zero, "288", 8)
            else:
                thread_barrier()  # dQ is there, and both warpgroups have read dS'
                add_dq(dq_desc, dq_tail_desc, dq_s, dq_tail_s, head * total_q + row_q + m * BLOCK_M, D, TAIL)
        else:
            corner = (gl.cast(head, gl.int64) * total_q + row_q + m * BLOCK_M) * (D + TAIL)
            reduce_add(dq_sum + corner + dq_places, dq, 8)
            if TAIL:
                reduce_add(dq_sum + corner + D + dq_tail_places, dq_tail, 8)
        if dq_first:
            s = warpgroup_mma_wait(1, deps=[s_issued])
        if not CARRY:
            if TAIL:
                dk_done, dk_tail_done = warpgroup_mma_wait(0, deps=[dk_issued, dk_tail_issued])
                dk_tail_issued = warpgroup_mma_init(dk_tail_done)
            else:
                dk_done = warpgroup_mma_wait(0, deps=[dk_issued])
            dk_issued = warpgroup_mma_init(dk_done)
            barrier_arrive(Q_FREE + stage, "288", 8)
        # the next block: `query_block` divides
        if DETERMINISTIC:
            m = gl.where(m == end, begin, m + step)
        else:
            m = m + 1
            head = gl.where(m == high, head + 1, head)
            m = gl.where(m == high, low, m)
        stage = next_stage
        phase = next_phase
    if TAIL:
        dk, dk_tail = warpgroup_mma_wait(0, deps=[dk_issued, dk_tail_issued])
    else:
        dk = warpgroup_mma_wait(0, deps=[dk_issued])
    if total > 0:
        if CARRY:
            barrier_arrive(Q_FREE + stage, "288", 8)
        if APART:
            fence_async_shared()
            group_barrier_arrive(DQ_FULL + 0 * total, "160", 8)
            group_barrier_sync(DQ_FREE + 0 * total, "160", 8)
        elif DETERMINISTIC:
            barrier_sync(DQ_FREE + 0 * total, "288", 8)
    if DQ_SHARED and not DETERMINISTIC and not APART:
        tma.store_wait(0)
    thread_barrier()
    # read the item again: kept through the loop, its numbers would take registers
    row_k, n_k, _, _, _, n, kv_head, head, _, _, _, index = key_item(
        items, n_columns, section, left, right, HEADS, GROUP, BLOCK_M, BLOCK_N, HAS_LEFT, HAS_RIGHT, DETERMINISTIC
    )
    row = row_k + n * BLOCK_N
    rows_left = n_k - n * BLOCK_N
    column = kv_head * (D + TAIL)
    if HEADS == GROUP:
        dk = (dk * scale).to(dtype)
        dv = dv.to(dtype)
        store_tile(dk_desc, dk_ptr, dk, k_s.index(0), row, column, rows_left, stride_dk, kv_layout)
        store_tile(dv_desc, dv_ptr, dv, v_s.index(0), row, column, rows_left, stride_dk, kv_layout)
        if TAIL:
            dk_tail = (dk_tail * scale).to(dtype)
            store_rows(dk_ptr, dk_tail, row, column + D, rows_left, stride_dk, kv_tail_layout)
            store_rows(dv_ptr, dv_tail.to(dtype), row, column + D, rows_left, stride_dk, kv_tail_layout)
        tma.store_wait(0)
    else:  # other items add to the same dK and dV
        corner = (gl.cast(kv_head, gl.int64) * total_k + row) * (D + TAIL)
        places = sum_places(D + TAIL, BLOCK_N, D, kv_layout)
        if DETERMINISTIC:
            kv_heads = n_columns * HEADS // GROUP
            turn = turns + (n_columns * HEADS * n_q_blocks + index * kv_heads + kv_head)
            wait_for_turn(turn, head // HEADS % (GROUP // HEADS), 8)
            thread_barrier()
        reduce_add(dk_sum + corner + places, dk, 8)
        reduce_add(dv_sum + corner + places, dv, 8)
        if TAIL:
            tail_places = sum_places(D + TAIL, BLOCK_N, TAIL, kv_tail_layout)
            reduce_add(dk_sum + corner + D + tail_places, dk_tail, 8)
            reduce_add(dv_sum + corner + D + tail_places, dv_tail, 8)
        if DETERMINISTIC:
            pass_turn(turn, 8)


@gluon.jit(do_not_specialize=["section", "n_q_blocks", "total_q", "total_k", "left", "right"])
def attention_backward_kernel(q_desc, k_desc, v_desc, do_desc, q_tail_desc, k_tail_desc, v_tail_desc, do_tail_desc,
                              lse_ptr, delta_ptr, dq_desc, dq_tail_desc, dk_desc, dv_desc, dk_ptr, dv_ptr,
                              dq_sum, dk_sum, dv_sum, turns, items, n_columns, section, n_q_blocks, total_q,
                              total_k, left, right, scale, scale2, softcap2, stride_dk,
                              HEADS: gl.constexpr, GROUP: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
                              D: gl.constexpr, TAIL: gl.constexpr, STAGES: gl.constexpr, CARRY: gl.constexpr,
                              DQ_SHARED: gl.constexpr, APART: gl.constexpr, HAS_LEFT: gl.constexpr,
                              HAS_RIGHT: gl.constexpr, HAS_SOFTCAP: gl.constexpr,
                              DETERMINISTIC: gl.constexpr):  # fmt: skip
    dtype: gl.constexpr = q_desc.dtype
    ds_layout: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    scalars_layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    k_s = gl.allocate_shared_memory(dtype, [1, BLOCK_N, D], k_desc.layout)
    v_s = gl.allocate_shared_memory(dtype, [1, BLOCK_N, D], v_desc.layout)
    q_s = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, D], q_desc.layout)
    do_s = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, D], do_desc.layout)
    k_tail_s, v_tail_s, q_tail_s, do_tail_s = k_s, v_s, q_s, do_s  # not used without a tail
    if TAIL:
        k_tail_s = gl.allocate_shared_memory(dtype, [1, BLOCK_N, TAIL], k_tail_desc.layout)
        v_tail_s = gl.allocate_shared_memory(dtype, [1, BLOCK_N, TAIL], v_tail_desc.layout)
        q_tail_s = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, TAIL], q_tail_desc.layout)
        do_tail_s = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, TAIL], do_tail_desc.layout)
    ds_s = gl.allocate_shared_memory(dtype, [1, BLOCK_N, BLOCK_M], ds_layout)
    p_s = ds_s
    if BLOCK_N == 64:
        p_s = gl.allocate_shared_memory(dtype, [1, BLOCK_N, BLOCK_M], ds_layout)
    lse_s = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], scalars_layout)
    delta_s = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], scalars_layout)
    dq_s, dq_tail_s = ds_s, ds_s
    if APART:
        dq_s = gl.allocate_shared_memory(gl.float32, [2, D * BLOCK_M // 4096, 64, 32], dq_desc.layout)
    elif DQ_SHARED:
        dq_s = gl.allocate_shared_memory(gl.float32, [D // 32, BLOCK_M, 32], dq_desc.layout)
        if TAIL:
            dq_tail_s = gl.allocate_shared_memory(gl.float32, [TAIL // 32, BLOCK_M, 32], dq_tail_desc.layout)
    kv_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    q_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    do_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(kv_full, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(q_full.index(i), count=33)  # the expected bytes, and 32 threads' lse or delta
        mbarrier.init(do_full.index(i), count=33)
    # the compiler wants each partition's arguments spelled out in the call
    if DETERMINISTIC or APART:
        gl.warp_specialize([
            (consumers, (dq_desc, dq_tail_desc, dk_desc, dv_desc, dk_ptr, dv_ptr, dq_sum, dk_sum, dv_sum, turns,
                         q_s, k_s, v_s, do_s, q_tail_s, k_tail_s, v_tail_s, do_tail_s,
                         lse_s, delta_s, p_s, ds_s, dq_s, dq_tail_s,
                         kv_full, q_full, do_full, items, n_columns, section, n_q_blocks, total_q, total_k,
                         left, right, scale, scale2, softcap2, stride_dk, HEADS, GROUP, BLOCK_M, BLOCK_N, D, TAIL,
                         STAGES, CARRY, DQ_SHARED, APART, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, DETERMINISTIC)),
            (producer, (q_desc, k_desc, v_desc, do_desc, q_tail_desc, k_tail_desc, v_tail_desc, do_tail_desc,
                        lse_ptr, delta_ptr, q_s, k_s, v_s, do_s, q_tail_s, k_tail_s, v_tail_s, do_tail_s,
                        lse_s, delta_s,
                        kv_full, q_full, do_full, items, n_columns, section, total_q, left, right,
                        HEADS, GROUP, BLOCK_M, BLOCK_N, D, TAIL, STAGES, HAS_LEFT, HAS_RIGHT, DETERMINISTIC)),
            (dq_writer, (dq_desc, dq_tail_desc, dq_s, dq_tail_s, turns, items, n_columns, section, n_q_blocks,
                         total_q, left, right, HEADS, GROUP, BLOCK_M, BLOCK_N, D, TAIL, APART, HAS_LEFT, HAS_RIGHT,
                         DETERMINISTIC)),
        ], [1, 1], [24, 24])  # fmt: skip
    else:
        gl.warp_specialize([
            (consumers, (dq_desc, dq_tail_desc, dk_desc, dv_desc, dk_ptr, dv_ptr, dq_sum, dk_sum, dv_sum, turns,
                         q_s, k_s, v_s, do_s, q_tail_s, k_tail_s, v_tail_s, do_tail_s,
                         lse_s, delta_s, p_s, ds_s, dq_s, dq_tail_s,
                         kv_full, q_full, do_full, items, n_columns, section, n_q_blocks, total_q, total_k,
                         left, right, scale, scale2, softcap2, stride_dk, HEADS, GROUP, BLOCK_M, BLOCK_N, D, TAIL,
                         STAGES, CARRY, DQ_SHARED, APART, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, DETERMINISTIC)),
            (producer, (q_desc, k_desc, v_desc, do_desc, q_tail_desc, k_tail_desc, v_tail_desc, do_tail_desc,
                        lse_ptr, delta_ptr, q_s, k_s, v_s, do_s, q_tail_s, k_tail_s, v_tail_s, do_tail_s,
                        lse_s, delta_s,
                        kv_full, q_full, do_full, items, n_columns, section, total_q, left, right,
                        HEADS, GROUP, BLOCK_M, BLOCK_N, D, TAIL, STAGES, HAS_LEFT, HAS_RIGHT, DETERMINISTIC)),
        ], [1], [24])  # fmt: skip
