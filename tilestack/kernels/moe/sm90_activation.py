"""The product through the activation, backwards, for Hopper, in Gluon.

With a = silu(gate) * up, w the route's weight (1 without weights) and da = down[e]' dout[token], not yet weighted:

    dweight = <da, a>                       weighted = w * a, for ddown
    dgate = w * da * up * silu'(gate)       dup = w * da * silu(gate)

The element-wise part reads two and writes three values for each of da: as an epilogue of the consumers it would leave
the tensor cores idle for as long as the product takes. So the consumers only round da to its dtype into shared memory
and go on with the next tile. The loader, whose four warps have little to do between two stages, works on the tile
before in pieces of 32 rows by 64 units, a piece every SPACING stages; the gates and ups of the next piece are on their
way meanwhile. `done` and `free` hand each consumer's half of a tile back and forth. (A fourth warpgroup for it would
leave each thread 128 registers, too few for a consumer's tile.)
"""

from __future__ import annotations

from dataclasses import asdict

import torch
import triton
import triton.language as tl

from tilestack.kernels import launch
from tilestack.kernels._gluon import async_copy, gl, gluon, mbarrier, narrow, tensor_descriptor, tma
from tilestack.kernels.moe.sm90_configs import ACTIVATION, ROUTES_CHUNK
from tilestack.kernels.moe.sm90_pieces import (
    accumulate,
    gathered,
    init_ring,
    next_stage,
    pass_by,
    quarters,
    row_tile,
    sigmoid,
)


@gluon.jit
def consumer(which: gl.constexpr, block_expert, block_row, n_blocks, a_s, b_s, da_s, full, empty, done, free,
             STEPS: gl.constexpr, N_TILES: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16])
    dtype: gl.constexpr = da_s.dtype
    stage = 0
    phase = 0
    handed = 0
    programs = gl.num_programs(0)
    n_tiles = gl.load(n_blocks) * N_TILES
    last_tile = gl.maximum(n_tiles - 1, 0)
    expert, row, has_second = row_tile(gl.minimum(gl.program_id(0), last_tile) // N_TILES, block_expert, block_row)
    for t in range(gl.program_id(0), n_tiles, programs):
        following = row_tile(gl.minimum(t + programs, last_tile) // N_TILES, block_expert, block_row)
        if has_second >= which:
            acc = gl.zeros([64, 256], gl.float32, layout)
            acc, stage, phase = accumulate(
                acc, a_s, b_s, full, empty, stage, phase, STEPS, which, False, False, True, STAGES
            )
            mbarrier.wait(free.index(which), (handed & 1) ^ 1)
            first, second, third, fourth = quarters(acc)
            da_s.index(which * 4).store(narrow(first, dtype))
            da_s.index(which * 4 + 1).store(narrow(second, dtype))
            da_s.index(which * 4 + 2).store(narrow(third, dtype))
            da_s.index(which * 4 + 3).store(narrow(fourth, dtype))
            mbarrier.arrive(done.index(which), count=1)
            handed += 1
        else:
            stage, phase = pass_by(full, empty, stage, phase, STEPS, STAGES)
        expert, row, has_second = following


@gluon.jit
def consumer_0(block_expert, block_row, n_blocks, a_s, b_s, da_s, full, empty, done, free,
               STEPS: gl.constexpr, N_TILES: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    consumer(0, block_expert, block_row, n_blocks, a_s, b_s, da_s, full, empty, done, free, STEPS, N_TILES, STAGES)


@gluon.jit
def consumer_1(block_expert, block_row, n_blocks, a_s, b_s, da_s, full, empty, done, free,
               STEPS: gl.constexpr, N_TILES: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    consumer(1, block_expert, block_row, n_blocks, a_s, b_s, da_s, full, empty, done, free, STEPS, N_TILES, STAGES)


@gluon.jit
def load_chunk(pre_activation, own, column, units, I: gl.constexpr):
    """Gates and ups of 64 units of the rows `own`; zeros behind the last unit."""
    places = own.to(gl.int64)[:, None] * (2 * I) + (units + column)[None, :]
    if I % 256 == 0:
        return gl.load(pre_activation + places), gl.load(pre_activation + (places + I))
    else:
        inside = (units + column < I)[None, :]
        gate = gl.load(pre_activation + places, mask=inside, other=0.0)
        return gate, gl.load(pre_activation + (places + I), mask=inside, other=0.0)


@gluon.jit
def store_chunk(pointer, own, stride: gl.constexpr, shift: gl.constexpr, column, value, units, I: gl.constexpr):
    """Write 64 units of the rows `own`, `shift` columns to the right; nothing behind the last unit."""
    places = own.to(gl.int64)[:, None] * stride + (units + (column + shift))[None, :]
    if I % 256 == 0:
        gl.store(pointer + places, value)
    else:
        gl.store(pointer + places, value, mask=(units + column < I)[None, :])


@gluon.jit
def load(dout, weight_desc, rows_0, rows_1, is_row_0, is_row_1, expert, n, a_s, b_s, full, empty, first_step, steps,
         stage, phase, H: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    """Fill `steps` stages of the current tile; returns where the ring stands."""
    for step in range(first_step, first_step + steps):
        mbarrier.wait(empty.index(stage), phase ^ 1)
        mbarrier.expect(full.index(stage), 256 * 64 * 2)
        tma.async_copy_global_to_shared(
            weight_desc, [expert * H + step * 64, n * 256], full.index(stage), b_s.index(stage)
        )
        async_copy.async_copy_global_to_shared(a_s.index(stage * 2), rows_0 + step * 64, is_row_0)
        async_copy.async_copy_global_to_shared(a_s.index(stage * 2 + 1), rows_1 + step * 64, is_row_1)
        async_copy.mbarrier_arrive(full.index(stage), increment_count=False)
        stage, phase = next_stage(stage, phase, STAGES)
    return stage, phase


@gluon.jit
def activate(gate, up, da, weight, dpre_activation, weighted, own, column, units, I: gl.constexpr,
             WANT_DPRE: gl.constexpr, WANT_WEIGHTED: gl.constexpr, dtype: gl.constexpr):  # fmt: skip
    """One piece: writes what it is the gradient of, returns <da, a> of each row."""
    gate = gate.to(gl.float32)
    up = up.to(gl.float32)
    s = sigmoid(gate)
    silu = gate * s
    a = silu * up
    dweight = gl.sum(da * a, 1)
    if WANT_WEIGHTED:
        store_chunk(weighted, own, I, 0, column, narrow(a * weight[:, None], dtype), units, I)
    if WANT_DPRE:
        da = da * weight[:, None]
        dgate = da * up * (s + silu * (1.0 - s))
        store_chunk(dpre_activation, own, 2 * I, 0, column, narrow(dgate, dtype), units, I)
        store_chunk(dpre_activation, own, 2 * I, I, column, narrow(da * silu, dtype), units, I)
    return dweight


@gluon.jit
def load_and_activate(dout, weight_desc, pre_activation, dpre_activation, weighted, partials, weights, row_to_route,
                      block_expert, block_row, n_blocks, a_s, b_s, da_s, weight_s, weight_quarters_s, full, empty,
                      done, free, stride, n_rows,
                      H: gl.constexpr, I: gl.constexpr, TOP_K: gl.constexpr, HAS_WEIGHTS: gl.constexpr,
                      WANT_DPRE: gl.constexpr, WANT_WEIGHTED: gl.constexpr, WANT_DWEIGHTS: gl.constexpr,
                      STAGES: gl.constexpr):  # fmt: skip
    STEPS: gl.constexpr = H // 64
    LEAD: gl.constexpr = STAGES if STAGES < STEPS else STEPS  # a full ring: the tile before is done, or nearly
    SPACING: gl.constexpr = (STEPS - LEAD) // 16
    N_TILES: gl.constexpr = (I + 255) // 256
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    dtype: gl.constexpr = da_s.dtype
    half = gl.arange(0, 64, layout=gl.SliceLayout(1, layout))
    rows = gl.arange(0, 32, layout=gl.SliceLayout(1, layout))
    units = gl.arange(0, 64, layout=gl.SliceLayout(0, layout))
    stage = 0
    phase = 0
    parity_0 = 0
    parity_1 = 0
    turn = 0
    before_row = 0  # the tile before: its first row, its column, how many pieces it has
    before_n = 0
    pieces = 0
    n_tiles = gl.load(n_blocks) * N_TILES
    programs = gl.num_programs(0)
    for t in range(gl.program_id(0), n_tiles + programs, programs):  # one turn more, for the pieces of the last tile
        is_tile = gl.where(t < n_tiles, 1, 0)
        place = gl.maximum(gl.minimum(t, n_tiles - 1), 0)
        n = place % N_TILES
        expert, row, has_second = row_tile(place // N_TILES, block_expert, block_row)
        routes_0 = gl.load(row_to_route + (row + half))
        routes_1 = gl.where(has_second > 0, gl.load(row_to_route + (row + 64 + half)), -1)
        is_row_0 = (routes_0 >= 0)[:, None]
        is_row_1 = (routes_1 >= 0)[:, None]
        rows_0 = gathered(dout, routes_0, stride, 0, 64, TOP_K, layout)
        rows_1 = gathered(dout, routes_1, stride, 0, 64, TOP_K, layout)
        if HAS_WEIGHTS:
            weight_0 = gl.load(weights + gl.maximum(routes_0, 0), mask=routes_0 >= 0, other=0.0)
            weight_1 = gl.load(weights + gl.maximum(routes_1, 0), mask=routes_1 >= 0, other=0.0)
        gate, up = load_chunk(pre_activation, before_row + rows, before_n * 256, units, I)
        dweight = gl.zeros([32], gl.float32, gl.SliceLayout(1, layout))
        stage, phase = load(dout, weight_desc, rows_0, rows_1, is_row_0, is_row_1, expert, n, a_s, b_s, full, empty,
                            0, LEAD * is_tile, stage, phase, H, STAGES)  # fmt: skip
        if HAS_WEIGHTS:  # here, so that no stage waits for these loads
            weight_s.index(turn * 2).store(weight_0)
            weight_s.index(turn * 2 + 1).store(weight_1)
        for piece in range(pieces):
            stage, phase = load(dout, weight_desc, rows_0, rows_1, is_row_0, is_row_1, expert, n, a_s, b_s, full, empty,
                                LEAD + piece * SPACING, SPACING * is_tile, stage, phase, H, STAGES)  # fmt: skip
            which = piece // 8  # 16 pieces: consumers, their halves, 64 units each
            chunk = piece % 4
            mbarrier.wait(done.index(which), gl.where(which == 0, parity_0, parity_1), pred=piece % 8 == 0)
            da = da_s.index((which * 4 + chunk) * 2 + (piece // 4) % 2).load(layout).to(gl.float32)
            own = before_row + piece // 4 * 32 + rows
            weight = gl.full([32], 1.0, gl.float32, gl.SliceLayout(1, layout))
            if HAS_WEIGHTS:
                weight = weight_quarters_s.index((turn ^ 1) * 4 + piece // 4).load(gl.SliceLayout(1, layout))
            dots = activate(gate, up, da, weight, dpre_activation, weighted, own, before_n * 256 + chunk * 64, units,
                            I, WANT_DPRE, WANT_WEIGHTED, dtype)  # fmt: skip
            mbarrier.arrive(free.index(which), count=1, pred=piece % 8 == 7)
            dweight = gl.where(chunk == 0, dots, dweight + dots)
            if WANT_DWEIGHTS and chunk == 3:
                gl.store(partials + (own.to(gl.int64) + gl.cast(before_n, gl.int64) * n_rows), dweight)
            following = gl.minimum(piece + 1, pieces - 1)
            own = before_row + following // 4 * 32 + rows
            gate, up = load_chunk(pre_activation, own, before_n * 256 + following % 4 * 64, units, I)
        begun = LEAD + pieces * SPACING
        stage, phase = load(dout, weight_desc, rows_0, rows_1, is_row_0, is_row_1, expert, n, a_s, b_s, full, empty,
                            begun, (STEPS - begun) * is_tile, stage, phase, H, STAGES)  # fmt: skip
        parity_0 = gl.where(pieces > 0, parity_0 ^ 1, parity_0)
        parity_1 = gl.where(pieces > 8, parity_1 ^ 1, parity_1)
        turn = turn ^ 1
        before_row = row
        before_n = n
        pieces = 8 + 8 * has_second
    async_copy.wait_group(0)


@gluon.jit
def moe_activation_bwd_sm90_kernel(
    dout, weight_desc, pre_activation, dpre_activation, weighted, partials, weights, row_to_route, block_expert,
    block_row, n_blocks, stride_dout, n_rows, H: gl.constexpr, I: gl.constexpr, TOP_K: gl.constexpr,
    HAS_WEIGHTS: gl.constexpr, WANT_DPRE: gl.constexpr, WANT_WEIGHTED: gl.constexpr, WANT_DWEIGHTS: gl.constexpr,
    STAGES: gl.constexpr, CONSUMER_REGISTERS: gl.constexpr, LOADER_REGISTERS: gl.constexpr,
):  # fmt: skip
    STEPS: gl.constexpr = H // 64
    N_TILES: gl.constexpr = (I + 255) // 256
    dtype: gl.constexpr = weight_desc.dtype
    a_s = gl.allocate_shared_memory(dtype, [2 * STAGES, 64, 64], weight_desc.layout)
    b_s = gl.allocate_shared_memory(dtype, [STAGES, 64, 256], weight_desc.layout)
    da_s = gl.allocate_shared_memory(dtype, [8, 64, 64], weight_desc.layout)
    piece_s = da_s._reinterpret(dtype, [16, 32, 64], weight_desc.layout)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    weight_s = gl.allocate_shared_memory(gl.float32, [4, 64], plain)  # of this tile's rows and of those before
    weight_quarters_s = weight_s._reinterpret(gl.float32, [8, 32], plain)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    done = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    init_ring(full, empty, STAGES, True)
    for which in gl.static_range(2):
        mbarrier.init(done.index(which), count=1)
        mbarrier.init(free.index(which), count=1)
    gl.warp_specialize([
        (consumer_0, (block_expert, block_row, n_blocks, a_s, b_s, da_s, full, empty, done, free,
                      STEPS, N_TILES, STAGES)),
        (consumer_1, (block_expert, block_row, n_blocks, a_s, b_s, da_s, full, empty, done, free,
                      STEPS, N_TILES, STAGES)),
        (load_and_activate, (dout, weight_desc, pre_activation, dpre_activation, weighted, partials, weights,
                             row_to_route, block_expert, block_row, n_blocks, a_s, b_s, piece_s, weight_s,
                             weight_quarters_s, full, empty, done, free, stride_dout, n_rows,
                             H, I, TOP_K, HAS_WEIGHTS, WANT_DPRE, WANT_WEIGHTED, WANT_DWEIGHTS, STAGES)),
    ], [4, 4], [CONSUMER_REGISTERS, LOADER_REGISTERS])  # fmt: skip


@triton.jit
def moe_dweights_kernel(
    partials_ptr, route_to_row_ptr, dweights_ptr, n_routes, n_rows, PARTS: tl.constexpr, CHUNK: tl.constexpr
):
    # dweights[route] = sum over the parts of a row's dot product, in their order; 0 for another rank's route
    routes = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    rows = tl.load(route_to_row_ptr + routes, mask=routes < n_routes, other=-1).to(tl.int64)
    total = tl.zeros([CHUNK], tl.float32)
    for part in tl.static_range(PARTS):
        total += tl.load(partials_ptr + part * n_rows.to(tl.int64) + rows, mask=rows >= 0, other=0.0)
    tl.store(dweights_ptr + routes, total, mask=routes < n_routes)


def activation_backward(dout, down, pre_activation, weights, layout, top_k, needs):
    """dpre_activation [rows, 2I], weighted activation [rows, I] and dtopk_weights [T, K]; None where not needed."""
    experts, hidden, units = down.shape
    n_rows, parts = layout.rows, -(-units // 256)
    want_dpre, want_weighted = "x" in needs or "gate_up" in needs, "down" in needs
    want_dweights = "topk_weights" in needs
    dpre_activation = torch.empty_like(pre_activation) if want_dpre else None
    weighted = pre_activation.new_empty((n_rows, units)) if want_weighted else None
    partials = pre_activation.new_empty((parts, n_rows), dtype=torch.float32) if want_dweights else None
    dweights = torch.empty_like(weights) if want_dweights else None
    unused = pre_activation
    with launch.on_device(dout):
        moe_activation_bwd_sm90_kernel[(launch.multiprocessors(dout),)](
            dout, tensor_descriptor(down.view(experts * hidden, units), [64, 256]), pre_activation,
            *(unused if each is None else each for each in (dpre_activation, weighted, partials, weights)),
            layout.row_to_route, layout.block_expert, layout.block_row, layout.n_blocks, dout.stride(0), n_rows,
            H=hidden, I=units, TOP_K=top_k, HAS_WEIGHTS=weights is not None,
            WANT_DPRE=want_dpre, WANT_WEIGHTED=want_weighted, WANT_DWEIGHTS=want_dweights,
            **asdict(ACTIVATION), num_warps=4,
        )  # fmt: skip
        if want_dweights:
            moe_dweights_kernel[(launch.cdiv(layout.routes, ROUTES_CHUNK),)](
                partials, layout.route_to_row, dweights, layout.routes, n_rows,
                PARTS=parts, CHUNK=ROUTES_CHUNK, num_warps=4,
            )  # fmt: skip
    return dpre_activation, weighted, dweights
