"""Products over an expert's rows for Hopper, in Gluon: the up-projection with its activation, and the plain ones.

    up:    [gate | up] = gate_up[e] x[token]      stores both, and activated = silu(gate) * up
    plain: out = rows weight                      down[e]' for the answers, gate_up[e] for dx of a row

A tile is a block of 128 rows of one expert by 256 columns; in the up-projection those are 128 gates and the ups of the
same units, so that one thread holds both. The tiles of a block follow one another: they share its rows in L2, as the
blocks of an expert share its weight. README.md has the schedule of the whole op.
"""

from __future__ import annotations

from tilestack.kernels import launch
from tilestack.kernels._gluon import gl, gluon, mbarrier, narrow, tensor_descriptor, thread_barrier, tma
from tilestack.kernels.moe.sm90_configs import ROWS, UP
from tilestack.kernels.moe.sm90_pieces import (
    SECOND,
    accumulate,
    init_ring,
    new_queue,
    pass_by,
    quarters,
    row_producer,
    sigmoid,
    store_chunk,
    take,
)


@gluon.jit
def store_activation(gate, up, pre_desc, activated_desc, row, column, staging, which: gl.constexpr,
                     group: gl.constexpr, I: gl.constexpr, WANT_PRE: gl.constexpr, WANT_ACTIVATED: gl.constexpr,
                     CHUNKS: gl.constexpr):  # fmt: skip
    dtype: gl.constexpr = pre_desc.dtype
    PRE: gl.constexpr = 2 if WANT_PRE else 0
    first: gl.constexpr = group * (PRE + (1 if WANT_ACTIVATED else 0))
    if column < I:
        if WANT_PRE:
            store_chunk(pre_desc, row, column, narrow(gate, dtype), staging, which, first, CHUNKS, False)
            store_chunk(pre_desc, row, I + column, narrow(up, dtype), staging, which, first + 1, CHUNKS, False)
        if WANT_ACTIVATED:
            activated = narrow(gate * sigmoid(gate) * up, dtype)
            store_chunk(activated_desc, row, column, activated, staging, which, first + PRE, CHUNKS, False)


@gluon.jit
def consumer(which: gl.constexpr, out_desc, activated_desc, queue_s, posted, a_s, b_s, staging,
             full, empty, STEPS: gl.constexpr, I: gl.constexpr, WANT_PRE: gl.constexpr,
             WANT_ACTIVATED: gl.constexpr, TRANSPOSED: gl.constexpr, STAGES: gl.constexpr,
             CHUNKS: gl.constexpr):  # fmt: skip
    """64 rows of each tile. WANT_PRE or WANT_ACTIVATED: the up-projection, out_desc of pre_activation, I its half."""
    ACTIVATE: gl.constexpr = WANT_PRE or WANT_ACTIVATED
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16])
    dtype: gl.constexpr = out_desc.dtype
    stage = 0
    phase = 0
    turn = 0
    place, row = take(queue_s, posted, turn, 4)
    while place >= 0:
        has_second = (place >> SECOND) & 1
        n = place >> (SECOND + 1)
        if has_second >= which:
            acc = gl.zeros([64, 256], gl.float32, layout)
            acc, stage, phase = accumulate(
                acc, a_s, b_s, full, empty, stage, phase, STEPS, which, False, TRANSPOSED, ACTIVATE, STAGES
            )
            tma.store_wait(0)
            thread_barrier()
            own = row + which * 64
            first, second, third, fourth = quarters(acc)
            if ACTIVATE:
                column = n * 128
                store_activation(first, third, out_desc, activated_desc, own, column, staging, which, 0, I,
                                 WANT_PRE, WANT_ACTIVATED, CHUNKS)  # fmt: skip
                column = n * 128 + 64
                store_activation(second, fourth, out_desc, activated_desc, own, column, staging, which, 1, I,
                                 WANT_PRE, WANT_ACTIVATED, CHUNKS)  # fmt: skip
            else:
                store_chunk(out_desc, own, n * 256, narrow(first, dtype), staging, which, 0, CHUNKS, False)
                store_chunk(out_desc, own, n * 256 + 64, narrow(second, dtype), staging, which, 1, CHUNKS, False)
                store_chunk(out_desc, own, n * 256 + 128, narrow(third, dtype), staging, which, 2, CHUNKS, False)
                store_chunk(out_desc, own, n * 256 + 192, narrow(fourth, dtype), staging, which, 3, CHUNKS, False)
        else:
            stage, phase = pass_by(full, empty, stage, phase, STEPS, STAGES)
        turn += 1
        place, row = take(queue_s, posted, turn, 4)
    tma.store_wait(0)


@gluon.jit
def consumer_0(out_desc, activated_desc, queue_s, posted, a_s, b_s, staging, full, empty,
               STEPS: gl.constexpr, I: gl.constexpr, WANT_PRE: gl.constexpr,
               WANT_ACTIVATED: gl.constexpr, TRANSPOSED: gl.constexpr, STAGES: gl.constexpr,
               CHUNKS: gl.constexpr):  # fmt: skip
    consumer(0, out_desc, activated_desc, queue_s, posted, a_s, b_s, staging, full, empty,
             STEPS, I, WANT_PRE, WANT_ACTIVATED, TRANSPOSED, STAGES, CHUNKS)  # fmt: skip


@gluon.jit
def consumer_1(out_desc, activated_desc, queue_s, posted, a_s, b_s, staging, full, empty,
               STEPS: gl.constexpr, I: gl.constexpr, WANT_PRE: gl.constexpr,
               WANT_ACTIVATED: gl.constexpr, TRANSPOSED: gl.constexpr, STAGES: gl.constexpr,
               CHUNKS: gl.constexpr):  # fmt: skip
    consumer(1, out_desc, activated_desc, queue_s, posted, a_s, b_s, staging, full, empty,
             STEPS, I, WANT_PRE, WANT_ACTIVATED, TRANSPOSED, STAGES, CHUNKS)  # fmt: skip


@gluon.jit
def moe_up_sm90_kernel(x, weight_desc, pre_desc, activated_desc, row_to_route, blocks, n_blocks, counter,
                       stride_x, H: gl.constexpr, I: gl.constexpr, TOP_K: gl.constexpr, WANT_PRE: gl.constexpr,
                       WANT_ACTIVATED: gl.constexpr, TICKETS: gl.constexpr, STAGES: gl.constexpr, CHUNKS: gl.constexpr,
                       CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr):  # fmt: skip
    STEPS: gl.constexpr = H // 64
    N_TILES: gl.constexpr = (I + 127) // 128
    dtype: gl.constexpr = pre_desc.dtype
    a_s = gl.allocate_shared_memory(dtype, [2 * STAGES, 64, 64], weight_desc.layout)
    halves_s = gl.allocate_shared_memory(dtype, [2 * STAGES, 128, 64], weight_desc.layout)
    b_s = halves_s._reinterpret(dtype, [STAGES, 256, 64], weight_desc.layout)
    staging = gl.allocate_shared_memory(dtype, [2 * CHUNKS, 64, 64], pre_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    queue_s, posted = new_queue(2)
    init_ring(full, empty, STAGES, 4)
    gl.warp_specialize([
        (consumer_0, (pre_desc, activated_desc, queue_s, posted, a_s, b_s, staging, full, empty,
                      STEPS, I, WANT_PRE, WANT_ACTIVATED, True, STAGES, CHUNKS)),
        (consumer_1, (pre_desc, activated_desc, queue_s, posted, a_s, b_s, staging, full, empty,
                      STEPS, I, WANT_PRE, WANT_ACTIVATED, True, STAGES, CHUNKS)),
        (row_producer, (pre_desc, x, weight_desc, row_to_route, blocks, n_blocks, counter, queue_s, posted,
                        a_s, halves_s, full, empty, stride_x,
                        STEPS, N_TILES, 2 * I, TOP_K, 4, True, True, TICKETS, STAGES)),
    ], [4, 4], [CONSUMER_REGISTERS, PRODUCER_REGISTERS])  # fmt: skip


@gluon.jit
def moe_rows_sm90_kernel(rows_desc, weight_desc, out_desc, blocks, n_blocks, counter,
                         DEPTH: gl.constexpr, WIDTH: gl.constexpr, EXPERT_ROWS: gl.constexpr, TRANSPOSED: gl.constexpr,
                         TICKETS: gl.constexpr, STAGES: gl.constexpr, CHUNKS: gl.constexpr,
                         CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr):  # fmt: skip
    STEPS: gl.constexpr = DEPTH // 64
    N_TILES: gl.constexpr = (WIDTH + 255) // 256
    dtype: gl.constexpr = out_desc.dtype
    a_s = gl.allocate_shared_memory(dtype, [2 * STAGES, 64, 64], rows_desc.layout)
    if TRANSPOSED:
        b_s = gl.allocate_shared_memory(dtype, [STAGES, 256, 64], weight_desc.layout)
    else:
        b_s = gl.allocate_shared_memory(dtype, [STAGES, 64, 256], weight_desc.layout)
    staging = gl.allocate_shared_memory(dtype, [2 * CHUNKS, 64, 64], out_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    queue_s, posted = new_queue(2)
    init_ring(full, empty, STAGES, 0)
    gl.warp_specialize([
        (consumer_0, (out_desc, out_desc, queue_s, posted, a_s, b_s, staging, full, empty,
                      STEPS, 0, False, False, TRANSPOSED, STAGES, CHUNKS)),
        (consumer_1, (out_desc, out_desc, queue_s, posted, a_s, b_s, staging, full, empty,
                      STEPS, 0, False, False, TRANSPOSED, STAGES, CHUNKS)),
        (row_producer, (rows_desc, blocks, weight_desc, blocks, blocks, n_blocks, counter, queue_s, posted,
                        a_s, b_s, full, empty, 0,
                        STEPS, N_TILES, EXPERT_ROWS, 1, 0, False, TRANSPOSED, TICKETS, STAGES)),
    ], [4, 1], [CONSUMER_REGISTERS, PRODUCER_REGISTERS])  # fmt: skip


def up(x, gate_up, layout, top_k, *, pre=True, activate=True):
    """pre_activation [rows, 2I] and activated [rows, I]; rows behind the layout's last are not written, and what is not
    wanted has no rows."""
    experts, width, hidden = gate_up.shape
    units = width // 2
    pre_activation = x.new_empty((layout.rows if pre else 0, width))
    activated = x.new_empty((layout.rows if activate else 0, units))
    with launch.on_device(x):
        launch.run(
            moe_up_sm90_kernel, (launch.multiprocessors(x),),
            x, tensor_descriptor(gate_up.view(experts * width, hidden), [128, 64]),
            tensor_descriptor(pre_activation if pre else activated, [64, 64]),
            tensor_descriptor(activated if activate else pre_activation, [64, 64]),
            layout.row_to_route, layout.blocks, layout.n_blocks, layout.tickets("up"), x.stride(0),
            H=hidden, I=units, TOP_K=top_k, WANT_PRE=pre, WANT_ACTIVATED=activate, TICKETS=layout.has_many_blocks,
            **vars(UP), num_warps=4,
        )  # fmt: skip
    return pre_activation, activated


def multiply(rows, weight, layout, *, transposed):
    """rows [R, K] times the expert's weight: [E, N, K] if it is transposed, else [E, K, N]. Returns [R, N]."""
    experts, height, width = weight.shape
    depth, columns = (width, height) if transposed else (height, width)
    out = rows.new_empty((layout.rows, columns))
    with launch.on_device(rows):
        launch.run(
            moe_rows_sm90_kernel, (launch.multiprocessors(rows),),
            tensor_descriptor(rows, [64, 64]),
            tensor_descriptor(weight.view(experts * height, width), [256, 64] if transposed else [64, 256]),
            tensor_descriptor(out, [64, 64]), layout.blocks, layout.n_blocks,
            layout.tickets("down" if transposed else "dx"),
            DEPTH=depth, WIDTH=columns, EXPERT_ROWS=height, TRANSPOSED=transposed,
            TICKETS=layout.has_many_blocks, **vars(ROWS), num_warps=4,
        )  # fmt: skip
    return out
