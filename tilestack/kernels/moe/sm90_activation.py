"""The product through the activation, backwards, for Hopper, in Gluon.

With a = silu(gate) * up, w the route's weight (1 without weights) and da = down[e]' dout[token], not yet weighted:

    dweight = <da, a>                       weighted = w * a, for ddown
    dgate = w * da * up * silu'(gate)       dup = w * da * silu(gate)

The element-wise part reads two and writes three values for each of da: as an epilogue of the consumers it would leave
the tensor cores idle for as long as the product takes. So the consumers only round da to its dtype into shared memory
and go on with the next tile. Two warps of their own, the activator, work on the tile before in pieces of 16 rows by 64
units; the gates and ups of the next four pieces are on their way meanwhile. `done` and `free` hand each consumer's half
of a tile back and forth. (A fourth warpgroup leaves each thread 128 registers, too few for a product of 64 x 256. With
two products of 64 x 128 there was room for it on an H100, but no time was won: the kernel waits for memory.)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tilestack.kernels import launch
from tilestack.kernels._gluon import gl, gluon, mbarrier, narrow, tensor_descriptor, thread_barrier, tma
from tilestack.kernels.moe.sm90_configs import ACTIVATION, ROUTES_CHUNK
from tilestack.kernels.moe.sm90_pieces import (
    SECOND,
    accumulate,
    init_ring,
    new_queue,
    pass_by,
    quarters,
    row_producer,
    sigmoid,
    take,
)


@gluon.jit
def consumer(which: gl.constexpr, queue_s, posted, a_s, b_s, da_s, full, empty, done, free,
             STEPS: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16])
    dtype: gl.constexpr = da_s.dtype
    stage = 0
    phase = 0
    handed = 0
    turn = 0
    place, row = take(queue_s, posted, turn, 4)
    while place >= 0:
        has_second = (place >> SECOND) & 1
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
        turn += 1
        place, row = take(queue_s, posted, turn, 4)


@gluon.jit
def consumer_0(queue_s, posted, a_s, b_s, da_s, full, empty, done, free,
               STEPS: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    consumer(0, queue_s, posted, a_s, b_s, da_s, full, empty, done, free, STEPS, STAGES)


@gluon.jit
def consumer_1(queue_s, posted, a_s, b_s, da_s, full, empty, done, free,
               STEPS: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    consumer(1, queue_s, posted, a_s, b_s, da_s, full, empty, done, free, STEPS, STAGES)


@gluon.jit
def load_piece(pre_desc, row, column, pre_s, loaded, slot: gl.constexpr, I: gl.constexpr, is_wanted):
    """Send for gates and ups of 16 rows and 64 units; whoever reads behind the last unit gets what nobody uses."""
    mbarrier.expect(loaded.index(slot), 2 * 16 * 64 * 2, pred=is_wanted)
    tma.async_copy_global_to_shared(pre_desc, [row, column], loaded.index(slot), pre_s.index(2 * slot), pred=is_wanted)
    tma.async_copy_global_to_shared(
        pre_desc, [row, I + column], loaded.index(slot), pre_s.index(2 * slot + 1), pred=is_wanted
    )


@gluon.jit
def store_chunk(pointer, own, stride: gl.constexpr, shift: gl.constexpr, column, value, units, I: gl.constexpr):
    """Write 64 units of the rows `own`, `shift` columns to the right; nothing behind the last unit."""
    places = own.to(gl.int64)[:, None] * stride + (units + (column + shift))[None, :]
    if I % 256 == 0:
        gl.store(pointer + places, value)
    else:
        gl.store(pointer + places, value, mask=(units + column < I)[None, :])


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
def activator(pre_desc, dpre_activation, weighted, partials, weights, row_to_route, queue_s, posted, pre_s, da_s,
              weight_s, weight_parts_s, loaded, done, free, n_rows, I: gl.constexpr, HAS_WEIGHTS: gl.constexpr,
              WANT_DPRE: gl.constexpr, WANT_WEIGHTED: gl.constexpr, WANT_DWEIGHTS: gl.constexpr):  # fmt: skip
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [2, 1], [1, 0])
    of_rows: gl.constexpr = gl.SliceLayout(1, layout)
    of_block: gl.constexpr = gl.BlockedLayout([2], [32], [2], [0])
    dtype: gl.constexpr = da_s.dtype
    rows = gl.arange(0, 16, layout=of_rows)
    block = gl.arange(0, 128, layout=of_block)
    units = gl.arange(0, 64, layout=gl.SliceLayout(0, layout))
    phase = 0
    parity_0 = 0
    parity_1 = 0
    turn = 0
    place, row = take(queue_s, posted, turn, 2)
    for slot in gl.static_range(4):
        load_piece(pre_desc, row, (place >> (SECOND + 1)) * 256 + slot * 64, pre_s, loaded, slot, I, place >= 0)
    while place >= 0:
        has_second = (place >> SECOND) & 1
        n = place >> (SECOND + 1)
        turn += 1
        next_place, next_row = take(queue_s, posted, turn, 2)
        next_n = next_place >> (SECOND + 1)
        if HAS_WEIGHTS:
            routes = gl.where(block < 64 + 64 * has_second, gl.load(row_to_route + (row + block)), -1)
            weight_s.index(0).store(gl.load(weights + gl.maximum(routes, 0), mask=routes >= 0, other=0.0))
        groups = 4 + 4 * has_second  # of 16 rows, four of each consumer
        for group in range(groups):
            which = group // 4
            is_last = group + 1 == groups
            has_next = (group + 1 < groups) | (next_place >= 0)
            load_row = gl.where(is_last, next_row, row + (group + 1) * 16)
            load_column = gl.where(is_last, next_n, n) * 256
            own = row + group * 16 + rows
            weight = gl.full([16], 1.0, gl.float32, of_rows)
            if HAS_WEIGHTS:
                weight = weight_parts_s.index(group).load(of_rows)
            dots = gl.zeros([16], gl.float32, of_rows)
            mbarrier.wait(done.index(which), gl.where(which == 0, parity_0, parity_1), pred=group % 4 == 0)
            for chunk in gl.static_range(4):
                mbarrier.wait(loaded.index(chunk), phase)
                gate = pre_s.index(2 * chunk).load(layout)
                up = pre_s.index(2 * chunk + 1).load(layout)
                # da_s: of each consumer four chunks of 64 units, of each chunk four groups
                da = da_s.index(which * 16 + chunk * 4 + group % 4).load(layout).to(gl.float32)
                thread_barrier()  # both warps have read
                load_piece(pre_desc, load_row, load_column + chunk * 64, pre_s, loaded, chunk, I, has_next)
                dots += activate(gate, up, da, weight, dpre_activation, weighted, own, n * 256 + chunk * 64, units,
                                 I, WANT_DPRE, WANT_WEIGHTED, dtype)  # fmt: skip
            phase = phase ^ 1
            mbarrier.arrive(free.index(which), count=1, pred=group % 4 == 3)
            if WANT_DWEIGHTS:
                gl.store(partials + (gl.cast(n, gl.int64) * n_rows + own), dots)
        parity_0 = parity_0 ^ 1
        parity_1 = parity_1 ^ has_second
        place = next_place
        row = next_row


@gluon.jit
def moe_activation_bwd_sm90_kernel(
    dout, weight_desc, pre_desc, dpre_activation, weighted, partials, weights, row_to_route, blocks, n_blocks,
    stride_dout, n_rows, H: gl.constexpr, I: gl.constexpr, TOP_K: gl.constexpr,
    HAS_WEIGHTS: gl.constexpr, WANT_DPRE: gl.constexpr, WANT_WEIGHTED: gl.constexpr, WANT_DWEIGHTS: gl.constexpr,
    STAGES: gl.constexpr, CONSUMER_REGISTERS: gl.constexpr, SIDE_REGISTERS: gl.constexpr,
):  # fmt: skip
    STEPS: gl.constexpr = H // 64
    N_TILES: gl.constexpr = (I + 255) // 256
    dtype: gl.constexpr = weight_desc.dtype
    a_s = gl.allocate_shared_memory(dtype, [2 * STAGES, 64, 64], weight_desc.layout)
    b_s = gl.allocate_shared_memory(dtype, [STAGES, 64, 256], weight_desc.layout)
    da_s = gl.allocate_shared_memory(dtype, [8, 64, 64], weight_desc.layout)
    pre_s = gl.allocate_shared_memory(dtype, [8, 16, 64], pre_desc.layout)  # gates and ups of four pieces
    piece_s = da_s._reinterpret(dtype, [32, 16, 64], weight_desc.layout)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    weight_s = gl.allocate_shared_memory(gl.float32, [1, 128], plain)
    weight_parts_s = weight_s._reinterpret(gl.float32, [8, 16], plain)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    loaded = gl.allocate_shared_memory(gl.int64, [4, 1], mbarrier.MBarrierLayout())
    done = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    queue_s, posted = new_queue(3)
    init_ring(full, empty, STAGES, 2)
    for slot in gl.static_range(4):
        mbarrier.init(loaded.index(slot), count=1)
    for which in gl.static_range(2):
        mbarrier.init(done.index(which), count=1)
        mbarrier.init(free.index(which), count=1)
    gl.warp_specialize([
        (consumer_0, (queue_s, posted, a_s, b_s, da_s, full, empty, done, free, STEPS, STAGES)),
        (consumer_1, (queue_s, posted, a_s, b_s, da_s, full, empty, done, free, STEPS, STAGES)),
        (activator, (pre_desc, dpre_activation, weighted, partials, weights, row_to_route, queue_s, posted, pre_s,
                     piece_s, weight_s, weight_parts_s, loaded, done, free, n_rows,
                     I, HAS_WEIGHTS, WANT_DPRE, WANT_WEIGHTED, WANT_DWEIGHTS)),
        (row_producer, (weight_desc, dout, weight_desc, row_to_route, blocks, n_blocks, n_blocks, queue_s, posted,
                        a_s, b_s, full, empty, stride_dout,
                        STEPS, N_TILES, H, TOP_K, 2, False, False, False, STAGES)),
    ], [4, 2, 2], [CONSUMER_REGISTERS, SIDE_REGISTERS, SIDE_REGISTERS])  # fmt: skip


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
        launch.run(
            moe_activation_bwd_sm90_kernel, (launch.multiprocessors(dout),),
            dout, tensor_descriptor(down.view(experts * hidden, units), [64, 256]),
            tensor_descriptor(pre_activation, [16, 64]),
            *(unused if each is None else each for each in (dpre_activation, weighted, partials, weights)),
            layout.row_to_route, layout.blocks, layout.n_blocks, dout.stride(0), n_rows,
            H=hidden, I=units, TOP_K=top_k, HAS_WEIGHTS=weights is not None,
            WANT_DPRE=want_dpre, WANT_WEIGHTED=want_weighted, WANT_DWEIGHTS=want_dweights,
            **vars(ACTIVATION), num_warps=4,
        )  # fmt: skip
        if want_dweights:
            launch.run(
                moe_dweights_kernel, (launch.cdiv(layout.routes, ROUTES_CHUNK),),
                partials, layout.route_to_row, dweights, layout.routes, n_rows,
                PARTS=parts, CHUNK=ROUTES_CHUNK, num_warps=4,
            )  # fmt: skip
    return dpre_activation, weighted, dweights
