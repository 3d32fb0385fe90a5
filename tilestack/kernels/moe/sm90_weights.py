"""The gradients of the experts' weights for Hopper, in Gluon.

    dweight[e] [M, N] = sum over the rows of e of a[row] (outer) b[row]

One of the two operands is gathered by token: dout for ddown (a), x for dgate_up (b). A tile is 128 x 256 of one expert,
64 rows a step; an expert without rows gets zeros. Tiles differ in length by the rows of their expert: they go largest
expert first to the programs that are free. The tiles of an expert follow one another: they share its rows in L2.
"""

from __future__ import annotations

from tilestack.kernels import launch
from tilestack.kernels._gluon import async_copy, gl, gluon, mbarrier, narrow, tensor_descriptor, thread_barrier, tma
from tilestack.kernels.moe.sm90_configs import WEIGHTS, WEIGHTS_AND_SUM
from tilestack.kernels.moe.sm90_pieces import (
    accumulate,
    draw,
    drawn,
    gathered,
    halves,
    init_ring,
    new_queue,
    next_stage,
    post,
    quarters,
    store_chunk,
    take,
)


@gluon.jit
def weight_tile(t, by_size, row_offsets, M_TILES: gl.constexpr, N_TILES: gl.constexpr):
    """Tile t: its expert's first row and steps of 64 rows, and the place of the tile."""
    expert = gl.load(by_size + t // (M_TILES * N_TILES))
    row = gl.load(row_offsets + expert)
    steps = (gl.load(row_offsets + (expert + 1)) - row) // 64
    return row, steps, (t // N_TILES) % M_TILES, t % N_TILES


@gluon.jit
def inside(routes, first_column, WIDTH: gl.constexpr, TILE: gl.constexpr, LIMIT: gl.constexpr, layout: gl.constexpr):
    """Which of WIDTH columns, part of a TILE, exist of the rows of `routes`."""
    if LIMIT % TILE == 0:
        return (routes >= 0)[:, None]
    else:
        columns = first_column + gl.arange(0, WIDTH, layout=gl.SliceLayout(0, layout))
        return (routes >= 0)[:, None] & (columns < LIMIT)[None, :]


@gluon.jit
def producer(a_desc, b_desc, source, row_to_route, by_size, row_offsets, counter, queue_s, posted, a_s, b_s,
             full, empty, stride, E, M: gl.constexpr, N: gl.constexpr, TOP_K: gl.constexpr, GATHER_A: gl.constexpr,
             WARPS: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    M_TILES: gl.constexpr = (M + 127) // 128
    N_TILES: gl.constexpr = (N + 255) // 256
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [WARPS, 1], [1, 0])
    rows = gl.arange(0, 64, layout=gl.SliceLayout(1, layout))
    stage = 0
    phase = 0
    lanes = gl.arange(0, 32 * WARPS, layout=gl.BlockedLayout([1], [32], [WARPS], [0]))
    turn = 0
    n_tiles = E * (M_TILES * N_TILES)
    t = gl.program_id(0)
    while t < n_tiles:
        ticket = draw(counter, lanes)
        first_row, steps, m, n = weight_tile(t, by_size, row_offsets, M_TILES, N_TILES)
        post(queue_s, posted, turn, t, steps, WARPS)
        turn += 1
        routes = gl.load(row_to_route + (first_row + rows))
        for step in range(steps):
            row = first_row + step * 64
            following = gl.load(row_to_route + (row + 64 + rows))
            mbarrier.wait(empty.index(stage), phase ^ 1)
            if GATHER_A:
                mbarrier.expect(full.index(stage), 64 * 256 * 2)
                tma.async_copy_global_to_shared(b_desc, [row, n * 256], full.index(stage), b_s.index(stage))
                for half in gl.static_range(2):
                    column = m * 128 + half * 64
                    async_copy.async_copy_global_to_shared(
                        a_s.index(stage * 2 + half),
                        gathered(source, routes, stride, column, 64, TOP_K, layout),
                        inside(routes, column, 64, 128, M, layout),
                    )
            else:
                mbarrier.expect(full.index(stage), 64 * 128 * 2)
                for half in gl.static_range(2):
                    column = m * 128 + half * 64
                    tma.async_copy_global_to_shared(
                        a_desc, [row, column], full.index(stage), a_s.index(stage * 2 + half)
                    )
                async_copy.async_copy_global_to_shared(
                    b_s.index(stage),
                    gathered(source, routes, stride, n * 256, 256, TOP_K, layout),
                    inside(routes, n * 256, 256, 256, N, layout),
                )
            async_copy.mbarrier_arrive(full.index(stage), increment_count=False)
            routes = following
            stage, phase = next_stage(stage, phase, STAGES)
        t = drawn(counter, ticket, lanes, n_tiles)
    post(queue_s, posted, turn, -1, 0, WARPS)
    async_copy.wait_group(0)


@gluon.jit
def store_quarter(out_desc, row, column, values, staging, which: gl.constexpr, index: gl.constexpr,
                  CHUNKS: gl.constexpr, ADD: gl.constexpr):  # fmt: skip
    """64 columns of a tile: one chunk, or in float32 two of 32 columns, as many bytes each."""
    if out_desc.dtype == gl.float32:
        left, right = halves(values, 64)
        store_chunk(out_desc, row, column, left, staging, which, 2 * index, CHUNKS, ADD)
        store_chunk(out_desc, row, column + 32, right, staging, which, 2 * index + 1, CHUNKS, ADD)
    else:
        store_chunk(out_desc, row, column, narrow(values, out_desc.dtype), staging, which, index, CHUNKS, ADD)


@gluon.jit
def consumer(which: gl.constexpr, out_desc, by_size, queue_s, posted, a_s, b_s, staging, full, empty,
             M: gl.constexpr, N: gl.constexpr, ADD: gl.constexpr, STAGES: gl.constexpr,
             CHUNKS: gl.constexpr):  # fmt: skip
    M_TILES: gl.constexpr = (M + 127) // 128
    N_TILES: gl.constexpr = (N + 255) // 256
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16])
    stage = 0
    phase = 0
    turn = 0
    t, steps = take(queue_s, posted, turn, 4)
    while t >= 0:
        expert = gl.load(by_size + t // (M_TILES * N_TILES))
        m = (t // N_TILES) % M_TILES
        n = t % N_TILES
        acc = gl.zeros([64, 256], gl.float32, layout)
        acc, stage, phase = accumulate(
            acc, a_s, b_s, full, empty, stage, phase, steps, which, True, False, True, STAGES
        )
        tma.store_wait(0)
        thread_barrier()
        if M % 128 == 0 or m * 128 + which * 64 < M:
            row = expert * M + m * 128 + which * 64
            first, second, third, fourth = quarters(acc)
            store_quarter(out_desc, row, n * 256, first, staging, which, 0, CHUNKS, ADD)
            store_quarter(out_desc, row, n * 256 + 64, second, staging, which, 1, CHUNKS, ADD)
            store_quarter(out_desc, row, n * 256 + 128, third, staging, which, 2, CHUNKS, ADD)
            store_quarter(out_desc, row, n * 256 + 192, fourth, staging, which, 3, CHUNKS, ADD)
        turn += 1
        t, steps = take(queue_s, posted, turn, 4)
    tma.store_wait(0)


@gluon.jit
def consumer_0(out_desc, by_size, queue_s, posted, a_s, b_s, staging, full, empty,
               M: gl.constexpr, N: gl.constexpr, ADD: gl.constexpr, STAGES: gl.constexpr,
               CHUNKS: gl.constexpr):  # fmt: skip
    consumer(0, out_desc, by_size, queue_s, posted, a_s, b_s, staging, full, empty, M, N, ADD, STAGES, CHUNKS)


@gluon.jit
def consumer_1(out_desc, by_size, queue_s, posted, a_s, b_s, staging, full, empty,
               M: gl.constexpr, N: gl.constexpr, ADD: gl.constexpr, STAGES: gl.constexpr,
               CHUNKS: gl.constexpr):  # fmt: skip
    consumer(1, out_desc, by_size, queue_s, posted, a_s, b_s, staging, full, empty, M, N, ADD, STAGES, CHUNKS)


@gluon.jit
def combiner(answers, route_to_row, out, T, H: gl.constexpr, TOP_K: gl.constexpr, TOP_K_PADDED: gl.constexpr):
    """out[t] = the sum over token t's rows of `answers`, which are done: what moe_combine_kernel does, in two warps
    beside a product that leaves memory half idle."""
    layout: gl.constexpr = gl.BlockedLayout([TOP_K_PADDED, 8], [1, 32], [1, 2], [1, 0])
    choices = gl.arange(0, TOP_K_PADDED, layout=gl.SliceLayout(1, layout))
    columns = gl.arange(0, 512, layout=gl.SliceLayout(0, layout))
    programs = gl.num_programs(0)
    token = gl.program_id(0)
    rows = gl.load(route_to_row + (token * TOP_K + choices), mask=(choices < TOP_K) & (token < T), other=-1)
    for token in range(gl.program_id(0), T, programs):
        is_next = (choices < TOP_K) & (token + programs < T)
        next_rows = gl.load(route_to_row + ((token + programs) * TOP_K + choices), mask=is_next, other=-1)
        places = gl.maximum(rows, 0).to(gl.int64) * H
        for start in range(0, H, 512):
            inside = (rows >= 0)[:, None] & (start + columns < H)[None, :]
            values = gl.load(answers + (places[:, None] + (start + columns)[None, :]), mask=inside, other=0.0)
            total = narrow(gl.sum(values.to(gl.float32), 0), out.dtype.element_ty)
            gl.store(out + (gl.cast(token, gl.int64) * H + start + columns), total, mask=start + columns < H)
        rows = next_rows


@gluon.jit
def moe_weights_bwd_sm90_kernel(a_desc, b_desc, source, out_desc, row_to_route, by_size, row_offsets, counter,
                                stride, E, answers, route_to_row, combined, T,
                                M: gl.constexpr, N: gl.constexpr, TOP_K: gl.constexpr, TOP_K_PADDED: gl.constexpr,
                                GATHER_A: gl.constexpr, COMBINE: gl.constexpr, ADD: gl.constexpr,
                                STAGES: gl.constexpr, CHUNKS: gl.constexpr, CONSUMER_REGISTERS: gl.constexpr,
                                PRODUCER_REGISTERS: gl.constexpr):  # fmt: skip
    WARPS: gl.constexpr = 2 if COMBINE else 4  # that gather
    CHUNK: gl.constexpr = 32 if out_desc.dtype == gl.float32 else 64
    a_s = gl.allocate_shared_memory(a_desc.dtype, [2 * STAGES, 64, 64], a_desc.layout)
    b_s = gl.allocate_shared_memory(a_desc.dtype, [STAGES, 64, 256], a_desc.layout)
    staging = gl.allocate_shared_memory(out_desc.dtype, [2 * CHUNKS, 64, CHUNK], out_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    queue_s, posted = new_queue(2)
    init_ring(full, empty, STAGES, WARPS)
    if COMBINE:
        gl.warp_specialize([
            (consumer_0, (out_desc, by_size, queue_s, posted, a_s, b_s, staging, full, empty, M, N, ADD,
                          STAGES, CHUNKS)),
            (consumer_1, (out_desc, by_size, queue_s, posted, a_s, b_s, staging, full, empty, M, N, ADD,
                          STAGES, CHUNKS)),
            (producer, (a_desc, b_desc, source, row_to_route, by_size, row_offsets, counter, queue_s, posted, a_s, b_s,
                        full, empty, stride, E,
                        M, N, TOP_K, GATHER_A, 2, STAGES)),
            (combiner, (answers, route_to_row, combined, T, N, TOP_K, TOP_K_PADDED)),
        ], [4, 2, 2], [CONSUMER_REGISTERS, PRODUCER_REGISTERS, PRODUCER_REGISTERS])  # fmt: skip
    else:
        gl.warp_specialize([
            (consumer_0, (out_desc, by_size, queue_s, posted, a_s, b_s, staging, full, empty, M, N, ADD,
                          STAGES, CHUNKS)),
            (consumer_1, (out_desc, by_size, queue_s, posted, a_s, b_s, staging, full, empty, M, N, ADD,
                          STAGES, CHUNKS)),
            (producer, (a_desc, b_desc, source, row_to_route, by_size, row_offsets, counter, queue_s, posted, a_s, b_s,
                        full, empty, stride, E,
                        M, N, TOP_K, GATHER_A, 4, STAGES)),
        ], [4, 4], [CONSUMER_REGISTERS, PRODUCER_REGISTERS])  # fmt: skip


def outer(a, b, layout, top_k, *, gather, answers=None, total=None):
    """[E, M, N]: for each expert the sum over its rows of a (outer) b; `gather` ("a" or "b") is of tokens, not rows.
    It is added to `total`, if there is one.

    With answers [rows, N], beside it also [T, N]: the sum over each token's rows of them; else None."""
    height, width = a.shape[1], b.shape[1]
    out = a.new_empty((layout.experts, height, width)) if total is None else total
    tokens = layout.routes // top_k
    combined = None if answers is None else a.new_empty((tokens, width))
    source, rows = (a, b) if gather == "a" else (b, a)
    block = [64, 256] if gather == "a" else [64, 64]
    rows_desc = tensor_descriptor(rows, block)
    tiles = vars(WEIGHTS if answers is None else WEIGHTS_AND_SUM)
    with launch.on_device(a):
        launch.run(
            moe_weights_bwd_sm90_kernel, (launch.multiprocessors(a),),
            rows_desc, rows_desc, source, tensor_descriptor(out.view(-1, width), [64, 128 // out.element_size()]),
            layout.row_to_route, layout.by_size, layout.row_offsets,
            layout.tickets("ddown" if gather == "a" else "dgate_up"), source.stride(0), layout.experts,
            source if answers is None else answers, layout.route_to_row, out if combined is None else combined, tokens,
            M=height, N=width, TOP_K=top_k, TOP_K_PADDED=launch.next_power_of_2(top_k), GATHER_A=gather == "a",
            COMBINE=answers is not None, ADD=total is not None, **tiles, num_warps=4,
        )  # fmt: skip
    return out, combined
