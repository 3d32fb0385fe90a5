"""The product through the activation, backwards, for Hopper, in Gluon.

With a = silu(gate) * up, w the route's weight (1 without weights) and da = down[e]' dout[token], not yet weighted:

    dweight = <da, a>      weighted = w * a, for ddown      dgate = w * da * up * silu'(gate)      dup = w * da * silu(gate)

The element-wise part reads two and writes three values for each of da: as an epilogue of the consumers it would leave
the tensor cores idle for as long as the product takes. So it has a warpgroup of its own: the consumers round da to its
dtype into shared memory and go on with the next tile, and the activation's warpgroup works on the one before, chunk by
chunk of 64 rows by 64 units, the next chunk's gates and ups on their way from memory. `done` and `free` hand each
consumer's half of the tile back and forth.
"""

from __future__ import annotations

from dataclasses import asdict

import torch
import triton
import triton.language as tl

from tilestack.kernels import launch
from tilestack.kernels._gluon import gl, gluon, mbarrier, narrow, tensor_descriptor
from tilestack.kernels.moe.sm90_configs import ACTIVATION, ROUTES_CHUNK
from tilestack.kernels.moe.sm90_pieces import (
    accumulate,
    init_ring,
    pass_by,
    quarters,
    row_producer,
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
def load_chunk(pre_activation, places, column, units, I: gl.constexpr):
    """Gates and ups of 64 units of 64 rows; zeros behind the last unit."""
    if I % 256 == 0:
        return gl.load(pre_activation + (places + column)), gl.load(pre_activation + (places + (column + I)))
    else:
        inside = (units + column < I)[None, :]
        gate = gl.load(pre_activation + (places + column), mask=inside, other=0.0)
        return gate, gl.load(pre_activation + (places + (column + I)), mask=inside, other=0.0)


@gluon.jit
def store_chunk(pointer, places, column, value, shift: gl.constexpr, units, I: gl.constexpr):
    """Write 64 units of 64 rows, `shift` columns further; nothing behind the last unit."""
    if I % 256 == 0:
        gl.store(pointer + (places + (column + shift)), value)
    else:
        gl.store(pointer + (places + (column + shift)), value, mask=(units + column < I)[None, :])


@gluon.jit
def activate(gate, up, weight, da_s, pre_activation, dpre_activation, weighted, own, n, which: gl.constexpr,
             I: gl.constexpr, WANT_DPRE: gl.constexpr, WANT_WEIGHTED: gl.constexpr,
             WANT_DWEIGHTS: gl.constexpr, layout: gl.constexpr):  # fmt: skip
    """One consumer's half of a tile, chunk by chunk; gate and up are the first chunk's. Returns <da, a> of each row."""
    dtype: gl.constexpr = da_s.dtype
    units = gl.arange(0, 64, layout=gl.SliceLayout(0, layout))
    places = own.to(gl.int64)[:, None] * (2 * I) + units[None, :]
    weighted_places = own.to(gl.int64)[:, None] * I + units[None, :]
    dweight = gl.zeros([64], gl.float32, gl.SliceLayout(1, layout))
    for chunk in gl.static_range(4):
        column = n * 256 + chunk * 64
        da = da_s.index(which * 4 + chunk).load(layout).to(gl.float32)
        g = gate.to(gl.float32)
        u = up.to(gl.float32)
        if chunk < 3:
            gate, up = load_chunk(pre_activation, places, column + 64, units, I)
        s = sigmoid(g)
        silu = g * s
        a = silu * u
        if WANT_DWEIGHTS:
            dweight += gl.sum(da * a, 1)
        if WANT_WEIGHTED:
            store_chunk(weighted, weighted_places, column, narrow(a * weight[:, None], dtype), 0, units, I)
        if WANT_DPRE:
            da = da * weight[:, None]
            dgate = da * u * (s + silu * (1.0 - s))
            store_chunk(dpre_activation, places, column, narrow(dgate, dtype), 0, units, I)
            store_chunk(dpre_activation, places, column, narrow(da * silu, dtype), I, units, I)
    return dweight


@gluon.jit
def activation(pre_activation, dpre_activation, weighted, partials, weights, row_to_route, block_expert, block_row,
               n_blocks, da_s, done, free, n_rows, N_TILES: gl.constexpr, I: gl.constexpr, HAS_WEIGHTS: gl.constexpr,
               WANT_DPRE: gl.constexpr, WANT_WEIGHTED: gl.constexpr, WANT_DWEIGHTS: gl.constexpr):  # fmt: skip
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    units = gl.arange(0, 64, layout=gl.SliceLayout(0, layout))
    handed_0 = 0
    handed_1 = 0
    for t in range(gl.program_id(0), gl.load(n_blocks) * N_TILES, gl.num_programs(0)):
        n = t % N_TILES
        expert, row, has_second = row_tile(t // N_TILES, block_expert, block_row)
        for which in gl.static_range(2):
            if has_second >= which:
                own = row + which * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, layout))
                places = own.to(gl.int64)[:, None] * (2 * I) + units[None, :]
                gate, up = load_chunk(pre_activation, places, n * 256, units, I)
                weight = gl.full([64], 1.0, gl.float32, gl.SliceLayout(1, layout))
                if HAS_WEIGHTS:
                    route = gl.load(row_to_route + own)
                    weight = gl.load(weights + gl.maximum(route, 0), mask=route >= 0, other=0.0)
                if which == 0:
                    mbarrier.wait(done.index(0), handed_0 & 1)
                    handed_0 += 1
                else:
                    mbarrier.wait(done.index(1), handed_1 & 1)
                    handed_1 += 1
                dweight = activate(
                    gate, up, weight, da_s, pre_activation, dpre_activation, weighted, own, n, which,
                    I, WANT_DPRE, WANT_WEIGHTED, WANT_DWEIGHTS, layout,
                )  # fmt: skip
                mbarrier.arrive(free.index(which), count=1)
                if WANT_DWEIGHTS:
                    gl.store(partials + (own.to(gl.int64) + gl.cast(n, gl.int64) * n_rows), dweight)


@gluon.jit
def moe_activation_bwd_kernel(
    dout, weight_desc, pre_activation, dpre_activation, weighted, partials, weights, row_to_route, block_expert,
    block_row, n_blocks, stride_dout, n_rows, H: gl.constexpr, I: gl.constexpr, TOP_K: gl.constexpr,
    HAS_WEIGHTS: gl.constexpr, WANT_DPRE: gl.constexpr, WANT_WEIGHTED: gl.constexpr, WANT_DWEIGHTS: gl.constexpr,
    STAGES: gl.constexpr, CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
    ACTIVATION_REGISTERS: gl.constexpr,
):  # fmt: skip
    STEPS: gl.constexpr = H // 64
    N_TILES: gl.constexpr = (I + 255) // 256
    dtype: gl.constexpr = weight_desc.dtype
    a_s = gl.allocate_shared_memory(dtype, [2 * STAGES, 64, 64], weight_desc.layout)
    b_s = gl.allocate_shared_memory(dtype, [STAGES, 64, 256], weight_desc.layout)
    da_s = gl.allocate_shared_memory(dtype, [8, 64, 64], weight_desc.layout)
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
        (row_producer, (weight_desc, dout, weight_desc, row_to_route, block_expert, block_row, n_blocks,
                        a_s, b_s, full, empty, stride_dout,
                        STEPS, N_TILES, H, TOP_K, True, False, False, STAGES)),
        (activation, (pre_activation, dpre_activation, weighted, partials, weights, row_to_route, block_expert,
                      block_row, n_blocks, da_s, done, free, n_rows,
                      N_TILES, I, HAS_WEIGHTS, WANT_DPRE, WANT_WEIGHTED, WANT_DWEIGHTS)),
    ], [4, 4, 4], [CONSUMER_REGISTERS, PRODUCER_REGISTERS, ACTIVATION_REGISTERS])  # fmt: skip


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
        moe_activation_bwd_kernel[(launch.multiprocessors(dout),)](
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
