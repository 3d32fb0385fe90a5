"""What the Hopper kernels of moe have in common: the ring of operands, gathered rows, tiles that leave through TMA.

Every kernel is persistent, with these roles in each program: two consumer warpgroups, which own 64 rows and 256 columns
of a tile each and share its right operand; one producer, which fills a ring of stages of 64 in depth (a TMA tile each,
or, where rows are gathered, cp.async from four warps; both count on the stage's `full` barrier). A consumer keeps one
wgmma in flight and gives a stage back when the next one's product has been issued.

The producer also chooses the program's tiles, and tells the other roles through a queue in shared memory. Tiles follow
one another over the programs: in turns, or by ticket, from a counter in global memory, to whoever is free. A ticket is
asked for when a tile begins and needed when it ends, so nobody waits for it.
"""

from __future__ import annotations

from tilestack.kernels._gluon import (
    async_copy,
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
    reciprocal,
    thread_barrier,
    tma,
    tma_reduce_add,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from tilestack.kernels.moe import sm90_layout
from tilestack.kernels.triton_numerics import LOG2E

SECOND = gl.constexpr(16)  # the bit beside an expert that says that its last block's second half has rows
FEW_BLOCKS = gl.constexpr(sm90_layout.FEW_BLOCKS)
QUEUE = gl.constexpr(4)  # tiles that may be announced before the slowest role has taken them


@gluon.jit
def next_stage(stage, phase, STAGES: gl.constexpr):
    wrapped = (stage + 1) // STAGES
    return stage + 1 - wrapped * STAGES, phase ^ wrapped


@gluon.jit
def init_ring(full, empty, STAGES: gl.constexpr, GATHER_WARPS: gl.constexpr):
    for stage in gl.static_range(STAGES):
        # one thread announces the bytes of TMA; each of those that gather arrives when its copies have
        mbarrier.init(full.index(stage), count=1 + 32 * GATHER_WARPS)
        mbarrier.init(empty.index(stage), count=2)


@gluon.jit
def accumulate(acc, a_s, b_s, full, empty, stage, phase, steps, which: gl.constexpr, A_IS_TRANSPOSED: gl.constexpr,
               B_IS_TRANSPOSED: gl.constexpr, GATHER: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    """acc [64, 256] += a b over `steps` stages of the ring; returns acc and where the ring stands."""
    for step in range(steps):
        mbarrier.wait(full.index(stage), phase)
        if GATHER:
            fence_async_shared()  # cp.async writes as threads do, wgmma reads as TMA does
        a = a_s.index(stage * 2 + which)
        b = b_s.index(stage)
        if A_IS_TRANSPOSED:
            a = a.permute((1, 0))
        if B_IS_TRANSPOSED:
            b = b.permute((1, 0))
        acc = warpgroup_mma(a, b, acc, is_async=True)
        acc = warpgroup_mma_wait(1, deps=[acc])
        mbarrier.arrive(empty.index((stage + (STAGES - 1)) % STAGES), count=1, pred=step > 0)
        stage, phase = next_stage(stage, phase, STAGES)
    acc = warpgroup_mma_wait(0, deps=[acc])
    mbarrier.arrive(empty.index((stage + (STAGES - 1)) % STAGES), count=1, pred=steps > 0)
    return acc, stage, phase


@gluon.jit
def pass_by(full, empty, stage, phase, steps, STAGES: gl.constexpr):
    """Give `steps` stages back unused: this consumer's half of the tile has no rows."""
    for _step in range(steps):
        mbarrier.wait(full.index(stage), phase)
        mbarrier.arrive(empty.index(stage), count=1)
        stage, phase = next_stage(stage, phase, STAGES)
    return stage, phase


@gluon.jit
def gathered(source, routes, stride, first_column, WIDTH: gl.constexpr, TOP_K: gl.constexpr, layout: gl.constexpr):
    """Pointers to WIDTH columns of the rows of `routes`' tokens."""
    columns = first_column + gl.arange(0, WIDTH, layout=gl.SliceLayout(0, layout))
    tokens = gl.maximum(routes, 0) // TOP_K
    return source + (tokens.to(gl.int64)[:, None] * stride + columns[None, :])


@gluon.jit
def row_tile(t, blocks, N_TILES: gl.constexpr):
    """Tile t of a product over rows: its expert, first row, whether its second half has rows, its place n of N_TILES.

    An expert's tiles go block by block, or n by n if it has few blocks: the weight's columns are then most of what a
    tile reads, and go to neighbours while they are in L2."""
    entry = blocks + (t // N_TILES) * 4  # of any block of the expert
    packed = gl.load(entry)
    first = gl.load(entry + 1)
    count = gl.load(entry + 2)
    row = gl.load(entry + 3)
    place = t - first * N_TILES
    by_columns = count <= FEW_BLOCKS
    inner = gl.where(by_columns, count, N_TILES)
    outer = place // inner
    inner = place - outer * inner
    block = gl.where(by_columns, inner, outer)
    n = gl.where(by_columns, outer, inner)
    has_second = gl.where(block + 1 == count, packed >> SECOND, 1)
    return packed & ((1 << SECOND) - 1), row + block * 128, has_second, n


@gluon.jit
def new_queue(READERS: gl.constexpr):
    """What the producer announces tiles with to READERS other roles: of each tile two numbers and two barriers."""
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    queue_s = gl.allocate_shared_memory(gl.int32, [2 * QUEUE, 1], plain)
    posted = gl.allocate_shared_memory(gl.int64, [2 * QUEUE, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(QUEUE):
        mbarrier.init(posted.index(slot), count=1)
        mbarrier.init(posted.index(QUEUE + slot), count=READERS)
    return queue_s, posted


@gluon.jit
def draw(counter, lanes):
    """Ask for a ticket; which tile it is for `drawn` says later."""
    return gl.atomic_add(counter + lanes, gl.where(lanes == 0, 1, 0), mask=lanes == 0, sem="relaxed")


@gluon.jit
def drawn(counter, ticket, lanes, n_tiles):
    """The tile of a ticket. The first tiles, one a program, need none.

    A program stops at a ticket behind the last tile, so there are as many tickets as tiles: whoever has the last one
    sets the counter back for the next launch."""
    number = gl.max(gl.where(lanes == 0, ticket, -1), 0)
    if number + 1 == n_tiles:
        gl.store(counter, 0)
    return number + gl.num_programs(0)


@gluon.jit
def post(queue_s, posted, turn, place, row, WARPS: gl.constexpr):
    """Announce this program's tile number `turn`; place -1: there is none."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    slot = turn % QUEUE
    mbarrier.wait(posted.index(QUEUE + slot), ((turn // QUEUE) & 1) ^ 1)
    queue_s.index(2 * slot).store(gl.full([1], 0, gl.int32, layout) + place)
    queue_s.index(2 * slot + 1).store(gl.full([1], 0, gl.int32, layout) + row)
    mbarrier.arrive(posted.index(slot), count=1)


@gluon.jit
def take(queue_s, posted, turn, WARPS: gl.constexpr):
    """What was announced as this program's tile number `turn`."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    slot = turn % QUEUE
    mbarrier.wait(posted.index(slot), (turn // QUEUE) & 1)
    place = gl.max(queue_s.index(2 * slot).load(layout), 0)
    row = gl.max(queue_s.index(2 * slot + 1).load(layout), 0)
    mbarrier.arrive(posted.index(QUEUE + slot), count=1)
    return place, row


@gluon.jit
def row_producer(a_desc, source, weight_desc, row_to_route, blocks, n_blocks, counter, queue_s, posted, a_s, b_s,
                 full, empty, stride, STEPS: gl.constexpr, N_TILES: gl.constexpr, EXPERT_ROWS: gl.constexpr,
                 TOP_K: gl.constexpr, GATHER_WARPS: gl.constexpr, PAIRED: gl.constexpr, TRANSPOSED: gl.constexpr,
                 TICKETS: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    """Loads the operands of a product over rows, tile after tile: rows of a block (with GATHER_WARPS of `source`, by
    token) and a part of the expert's weight, which is [EXPERT_ROWS, .]: its rows n (TRANSPOSED; PAIRED: half of them
    gates, half ups) or its columns n.

    A tile is announced as expert, SECOND and n in one number, and its first row."""
    WARPS: gl.constexpr = GATHER_WARPS if GATHER_WARPS else 1
    lanes = gl.arange(0, 32 * WARPS, layout=gl.BlockedLayout([1], [32], [WARPS], [0]))
    stage = 0
    phase = 0
    turn = 0
    n_tiles = gl.load(n_blocks) * N_TILES
    t = gl.program_id(0)
    while t < n_tiles:
        if TICKETS:
            ticket = draw(counter, lanes)
        expert, row, has_second, n = row_tile(t, blocks, N_TILES)
        post(queue_s, posted, turn, expert + (has_second << SECOND) + (n << (SECOND + 1)), row, WARPS)
        turn += 1
        if GATHER_WARPS:
            gather: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [GATHER_WARPS, 1], [1, 0])
            half = gl.arange(0, 64, layout=gl.SliceLayout(1, gather))
            routes_0 = gl.load(row_to_route + (row + half))
            routes_1 = gl.where(has_second > 0, gl.load(row_to_route + (row + 64 + half)), -1)
            is_row_0 = (routes_0 >= 0)[:, None]
            is_row_1 = (routes_1 >= 0)[:, None]
            rows_0 = gathered(source, routes_0, stride, 0, 64, TOP_K, gather)
            rows_1 = gathered(source, routes_1, stride, 0, 64, TOP_K, gather)
        for step in range(STEPS):
            mbarrier.wait(empty.index(stage), phase ^ 1)
            if GATHER_WARPS:
                mbarrier.expect(full.index(stage), 256 * 64 * 2)
            else:
                mbarrier.expect(full.index(stage), (256 + 128) * 64 * 2)
            if PAIRED:
                first = expert * EXPERT_ROWS + n * 128
                tma.async_copy_global_to_shared(
                    weight_desc, [first, step * 64], full.index(stage), b_s.index(stage * 2)
                )
                tma.async_copy_global_to_shared(
                    weight_desc, [first + EXPERT_ROWS // 2, step * 64], full.index(stage), b_s.index(stage * 2 + 1)
                )
            elif TRANSPOSED:
                tma.async_copy_global_to_shared(
                    weight_desc, [expert * EXPERT_ROWS + n * 256, step * 64], full.index(stage), b_s.index(stage)
                )
            else:
                tma.async_copy_global_to_shared(
                    weight_desc, [expert * EXPERT_ROWS + step * 64, n * 256], full.index(stage), b_s.index(stage)
                )
            if GATHER_WARPS:
                async_copy.async_copy_global_to_shared(a_s.index(stage * 2), rows_0 + step * 64, is_row_0)
                async_copy.async_copy_global_to_shared(a_s.index(stage * 2 + 1), rows_1 + step * 64, is_row_1)
                async_copy.mbarrier_arrive(full.index(stage), increment_count=False)
            else:
                tma.async_copy_global_to_shared(a_desc, [row, step * 64], full.index(stage), a_s.index(stage * 2))
                tma.async_copy_global_to_shared(
                    a_desc, [row + 64, step * 64], full.index(stage), a_s.index(stage * 2 + 1)
                )
            stage, phase = next_stage(stage, phase, STAGES)
        if TICKETS:
            t = drawn(counter, ticket, lanes, n_tiles)
        else:
            t += gl.num_programs(0)
    post(queue_s, posted, turn, -1, 0, WARPS)
    if GATHER_WARPS:
        async_copy.wait_group(0)


@gluon.jit
def halves(x, WIDTH: gl.constexpr):
    """The left and right half of an accumulator [64, WIDTH]: a thread has both, so nothing moves."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH // 2, 16])
    left, right = gl.split(x.reshape([64, 2, WIDTH // 2]).permute([0, 2, 1]))
    return gl.convert_layout(left, layout, assert_trivial=True), gl.convert_layout(right, layout, assert_trivial=True)


@gluon.jit
def quarters(acc):
    """An accumulator [64, 256] as four of 64 columns."""
    left, right = halves(acc, 256)
    first, second = halves(left, 128)
    third, fourth = halves(right, 128)
    return first, second, third, fourth


@gluon.jit
def store_chunk(desc, row, column, chunk, staging, which: gl.constexpr, index: gl.constexpr, CHUNKS: gl.constexpr,
                ADD: gl.constexpr):  # fmt: skip
    """Write the tile's chunk number `index` [64, 64], or add it, through this consumer's ring of CHUNKS buffers.

    The ring is empty when a tile begins (tma.store_wait(0))."""
    if index >= CHUNKS:
        tma.store_wait(CHUNKS - 1)
        thread_barrier()
    buffer = staging.index(which * CHUNKS + index % CHUNKS)
    buffer.store(chunk)
    fence_async_shared()
    thread_barrier()
    if ADD:
        tma_reduce_add(desc, [row, column], buffer)
    else:
        tma.async_copy_shared_to_global(desc, [row, column], buffer)


@gluon.jit
def sigmoid(x):
    return reciprocal(1.0 + gl.exp2(x * -LOG2E))
