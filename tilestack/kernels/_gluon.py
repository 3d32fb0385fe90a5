"""The one place that knows Gluon's API, which moves between Triton's releases (3.6 to 3.8 here).

Hopper kernels import Gluon's names from here, and the few things that Gluon does not wrap: TMA's reduction, named
barriers, fast reciprocals and packed conversions. `testing/gluon_emulator.py` has a CPU version of every name here.
"""

from __future__ import annotations

import functools
import threading

import torch
from triton._C.libtriton import ir
from triton.experimental import gluon
from triton.experimental.gluon import constexpr_function
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

__all__ = [
    "TensorDescriptor",
    "async_copy",
    "barrier_arrive",
    "barrier_sync",
    "beside",
    "constexpr_function",
    "fence_async_shared",
    "gl",
    "gluon",
    "group_barrier_arrive",
    "group_barrier_sync",
    "mask_rows",
    "mbarrier",
    "narrow",
    "partial_row_max",
    "partial_row_sums",
    "pass_turn",
    "read_turn",
    "reciprocal",
    "reduce_add",
    "round_to_bf16",
    "scale_rows",
    "swizzled",
    "tensor_descriptor",
    "thread_barrier",
    "tma",
    "tma_reduce_add",
    "wait_for_turn",
    "warpgroup_mma",
    "warpgroup_mma_init",
    "warpgroup_mma_wait",
    "widen",
]

thread_barrier = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier  # renamed in 3.7


@builtin
def tma_reduce_add(desc, coord, src, _semantic=None):
    """Add the tile in shared memory to global memory (bulk asynchronous, completes as a TMA store does)."""
    coord = _semantic._convert_to_ir_values(coord, require_i64=False)
    _semantic.builder.create_async_tma_reduce(ir.DESCRIPTOR_REDUCE_KIND.ADD, desc.handle, coord, src.handle)


@constexpr_function
def _reduce_add_code(registers: int) -> tuple[str, str]:
    """(instructions, constraints): 8 registers hold 16 columns of two rows, which are a vector of 4 in each row."""
    outputs, code = registers // 4, ""
    pointers, values = outputs, outputs + registers
    for first in range(0, registers, 8):
        for row in (0, 2):
            vector = ", ".join(f"${values + first + row + each}" for each in (0, 1, 4, 5))
            code += f"red.global.add.v4.f32 [${pointers + row} + {8 * first}], {{{vector}}}; "
    code += " ".join(f"mov.b32 ${each}, 0;" for each in range(outputs))
    return code, ",".join(["=r"] * outputs + ["l"] * registers + ["f"] * registers)


@constexpr_function
def _values_of_a_thread(shape, num_warps: int) -> int:
    return shape[0] * shape[1] // (32 * num_warps)


@gluon.jit
def reduce_add(pointers, values, num_warps: gl.constexpr):
    """Add an accumulator [M, N] of wgmma to float32 in global memory, 16 bytes at once.

    Rows lie anywhere, aligned to 16 bytes. Of each 16 columns c those of a thread lie side by side, in the order of its
    registers: c // 2 % 4, c // 8, c % 2.
    """
    registers: gl.constexpr = _values_of_a_thread(values.shape, num_warps)
    code: gl.constexpr = _reduce_add_code(registers)
    gl.inline_asm_elementwise(
        code[0], code[1], [gl.cast(pointers, gl.int64), values], dtype=gl.int8, is_pure=False, pack=registers
    )


@gluon.jit
def _for_each_thread(code: gl.constexpr, constraints: gl.constexpr, pointer, number, num_warps: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [num_warps], [0])
    pointers = gl.full([num_warps * 32], 0, gl.int64, layout) + gl.cast(pointer, gl.int64)
    numbers = gl.full([num_warps * 32], 0, gl.int32, layout) + number
    gl.inline_asm_elementwise(code, constraints, [pointers, numbers], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def read_turn(pointer, num_warps: gl.constexpr):
    """What a counter in global memory has reached, as each thread reads it; does not wait for the answer."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [num_warps], [0])
    pointers = gl.full([num_warps * 32], 0, gl.int64, layout) + gl.cast(pointer, gl.int64)
    return gl.inline_asm_elementwise(
        "ld.acquire.gpu.global.b32 $0, [$1];", "=r,l", [pointers], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def wait_for_turn(pointer, turn, num_warps: gl.constexpr, reached=None):
    """Wait until the counter in global memory is at `turn`; then what was written before is seen.

    reached: what read_turn gave, if it was asked.
    """
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [num_warps], [0])
    pointers = gl.full([num_warps * 32], 0, gl.int64, layout) + gl.cast(pointer, gl.int64)
    numbers = gl.full([num_warps * 32], 0, gl.int32, layout) + turn
    if reached is None:
        reached = gl.full([num_warps * 32], -1, gl.int32, layout)
    gl.inline_asm_elementwise(
        "{ .reg .pred p; .reg .b32 t; mov.b32 t, $3; bra check; again: ld.acquire.gpu.global.b32 t, [$1]; "
        "check: setp.ne.b32 p, t, $2; @p bra again; mov.b32 $0, t; }",
        "=r,l,r,r", [pointers, numbers, reached], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def pass_turn(pointer, num_warps: gl.constexpr):
    """Add 1 to the counter in global memory, after all that the caller's threads and their TMA have written."""
    if num_warps == 1:  # in one piece: more of them, and ptxas no longer sees what is the same in every lane
        _for_each_thread(
            "{ .reg .pred p; .reg .b32 t; cp.async.bulk.wait_group 0; bar.warp.sync 0xffffffff; mov.u32 t, %laneid; "
            "setp.eq.u32 p, t, 0; @p red.release.gpu.global.add.u32 [$1], 1; mov.b32 $0, 0; }",
            "=r,l,r", pointer, 0, 1,
        )  # fmt: skip
    else:
        _for_each_thread("cp.async.bulk.wait_group 0; mov.b32 $0, 0;", "=r,l,r", pointer, 0, num_warps)
        thread_barrier()  # the release below then covers what the other threads have written
        _for_each_thread(
            "{ .reg .pred p; .reg .b32 t; mov.u32 t, %tid.x; rem.u32 t, t, $2; setp.eq.u32 p, t, 0; "
            "@p red.release.gpu.global.add.u32 [$1], 1; mov.b32 $0, 0; }",
            "=r,l,r", pointer, 32 * num_warps, num_warps,
        )  # fmt: skip


@gluon.jit
def widen(x, dtype: gl.constexpr):
    """bfloat16 or float16 to float32, a pair at once: plain casts take the registers of both at the same time."""
    if dtype == gl.bfloat16:
        return gl.inline_asm_elementwise(
            "{ .reg .b32 t; shl.b32 t, $2, 16; mov.b32 $0, t; and.b32 t, $2, 0xffff0000; mov.b32 $1, t; }",
            "=&f,=f,r", [x], dtype=gl.float32, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        return gl.inline_asm_elementwise(
            "{ .reg .b16 a, b; mov.b32 {a, b}, $2; cvt.f32.f16 $0, a; cvt.f32.f16 $1, b; }",
            "=&f,=f,r", [x], dtype=gl.float32, is_pure=True, pack=2,
        )  # fmt: skip


@gluon.jit
def barrier_sync(index, threads: gl.constexpr, num_warps: gl.constexpr):
    """Wait at hardware barrier `index` until `threads` threads (a string: "256") have come; the caller has num_warps.

    Cheaper than an mbarrier, whose arrival Gluon guards with a barrier over the caller's warps.
    """
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [num_warps], [0])
    lanes = gl.full([num_warps * 32], 0, gl.int32, layout) + index
    gl.inline_asm_elementwise(
        "bar.sync $1, " + threads + "; mov.b32 $0, $1;", "=r,r", [lanes], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def barrier_arrive(index, threads: gl.constexpr, num_warps: gl.constexpr):
    """Come to hardware barrier `index` without waiting."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [num_warps], [0])
    lanes = gl.full([num_warps * 32], 0, gl.int32, layout) + index
    gl.inline_asm_elementwise(
        "bar.arrive $1, " + threads + "; mov.b32 $0, $1;", "=r,r", [lanes], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def group_barrier_sync(index, threads: gl.constexpr, num_warps: gl.constexpr):
    """Wait at hardware barrier `index` + warpgroup, each warpgroup at its own; the caller has the first warps."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [num_warps], [0])
    lanes = gl.full([num_warps * 32], 0, gl.int32, layout) + index
    gl.inline_asm_elementwise(
        "{ .reg .b32 t; mov.u32 t, %tid.x; shr.u32 t, t, 7; add.u32 t, t, $1; bar.sync t, " + threads + "; "
        "mov.b32 $0, $1; }",
        "=r,r", [lanes], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def group_barrier_arrive(index, threads: gl.constexpr, num_warps: gl.constexpr):
    """Come to the barrier of group_barrier_sync without waiting."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [num_warps], [0])
    lanes = gl.full([num_warps * 32], 0, gl.int32, layout) + index
    gl.inline_asm_elementwise(
        "{ .reg .b32 t; mov.u32 t, %tid.x; shr.u32 t, t, 7; add.u32 t, t, $1; bar.arrive t, " + threads + "; "
        "mov.b32 $0, $1; }",
        "=r,r", [lanes], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def reciprocal(x):
    """1 / x to about one unit in the last place of float32, in one instruction."""
    return gl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def round_to_bf16(x):
    """(bfloat16(x), float32(bfloat16(x))), one packed conversion a pair: plain casts become one conversion a value."""
    return gl.inline_asm_elementwise(
        "{ .reg .b32 t; cvt.rn.bf16x2.f32 $0, $4, $3; shl.b32 t, $0, 16; mov.b32 $1, t; "
        "and.b32 t, $0, 0xffff0000; mov.b32 $2, t; }",
        "=&r,=&f,=&f,f,f",
        [x],
        dtype=(gl.bfloat16, gl.float32),
        is_pure=True,
        pack=2,
    )


@gluon.jit
def narrow(x, dtype: gl.constexpr):
    """float32 to bfloat16 or float16, one packed conversion a pair: plain casts become one conversion a value."""
    if dtype == gl.bfloat16:
        return gl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [x], dtype=gl.bfloat16, is_pure=True, pack=2
        )
    else:
        return gl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [x], dtype=gl.float16, is_pure=True, pack=2
        )


@gluon.jit
def partial_row_sums(x):
    """[M, N] to [M, 8], the sums of every eighth column: in wgmma's layout a thread adds up what it holds already."""
    return gl.sum(gl.reshape(x, [x.shape[0], x.shape[1] // 8, 8]), 1)


@gluon.jit
def partial_row_max(x):
    """[M, N] to [M, 8], the largest of every eighth column: chains of comparisons that do not wait for one another."""
    return gl.max(gl.reshape(x, [x.shape[0], x.shape[1] // 8, 8]), 1)


@gluon.jit
def beside(rows, partial):
    """rows [M] as [M, 1], in the layout of partial [M, 8]."""
    layout: gl.constexpr = gl.SliceLayout(1, partial.type.layout)
    return gl.convert_layout(rows, layout)[:, None]


@constexpr_function
def _scaling(registers):
    """(PTX, constraints): multiplies numbers by factors unless those of the warp's rows are all 1.

    In wgmma's layout the first factors are those of one of the thread's two rows, the third and fourth of the other.
    """
    lines = [
        ".reg .pred p, q;",
        f"setp.neu.f32 p, ${2 * registers}, 0f3F800000;",
        f"setp.neu.or.f32 q, ${2 * registers + 2}, 0f3F800000, p;",
        "vote.sync.any.pred p, q, 0xffffffff;",
        "@!p bra L${:uid};",
        *(f"mul.f32 ${i}, ${i}, ${2 * registers + i};" for i in range(registers)),
        "L${:uid}:",
    ]
    constraints = ["=f"] * registers + [str(i) for i in range(registers)] + ["f"] * registers
    return "{ " + " ".join(lines) + " }", ",".join(constraints)


@gluon.jit
def scale_rows(x, factors):
    """x [64, N] in wgmma's layout of one warpgroup, each row times its factor [64]; cheap where all are 1."""
    REGISTERS: gl.constexpr = min(x.shape[1] // 2, 64)
    TEXT: gl.constexpr = _scaling(REGISTERS)
    layout: gl.constexpr = gl.SliceLayout(1, x.type.layout)
    columns = gl.convert_layout(factors, layout)[:, None]
    return gl.inline_asm_elementwise(TEXT[0], TEXT[1], [x, columns], dtype=gl.float32, is_pure=False, pack=REGISTERS)


@constexpr_function
def _masking(registers, HAS_LEFT):
    """(PTX, constraints): -inf in place of what lies outside of its row's bounds, unless those cut no row of the warp.

    In wgmma's layout a thread's registers are pairs of columns of its two rows in turn, the next pair 8 columns on.
    """
    last, first = 2 * registers, 3 * registers  # operands: the last column of each value's row, and the first
    lines = [
        ".reg .pred p; .reg .b32 t, h0, h1, l0, l1;",
        f"min.s32 h0, ${last}, ${last + 2}; setp.lt.s32 p, h0, {2 * registers - 1};",
    ]
    if HAS_LEFT:
        lines.append(f"max.s32 l0, ${first}, ${first + 2}; setp.gt.or.s32 p, l0, 0, p;")
    lines += [
        "vote.sync.any.pred p, p, 0xffffffff;",
        "@!p bra L${:uid};",
        "mov.u32 t, %laneid; and.b32 t, t, 3; shl.b32 t, t, 1;",  # the thread's first column
    ]
    for row in range(2):
        lines.append(f"sub.s32 h{row}, ${last + 2 * row}, t;")
        if HAS_LEFT:
            lines.append(f"sub.s32 l{row}, ${first + 2 * row}, t;")
    for i in range(registers):
        column, row = 8 * (i // 4) + i % 2, i // 2 % 2
        lines.append(f"setp.lt.s32 p, h{row}, {column};")
        if HAS_LEFT:
            lines.append(f"setp.gt.or.s32 p, l{row}, {column}, p;")
        lines.append(f"selp.f32 ${i}, 0fFF800000, ${i}, p;")
    lines.append("L${:uid}:")
    operands = (2 if HAS_LEFT else 1) * registers
    constraints = ["=f"] * registers + [str(i) for i in range(registers)] + ["r"] * operands
    return "{ " + " ".join(lines) + " }", ",".join(constraints)


@gluon.jit
def mask_rows(x, last, first, HAS_LEFT: gl.constexpr):
    """x [64, N] in wgmma's layout of one warpgroup, -inf outside of columns first [64] to last [64] of each row.

    first counts only if HAS_LEFT. Plain comparisons are made long before they are used, and registers run out.
    """
    REGISTERS: gl.constexpr = x.shape[1] // 2
    TEXT: gl.constexpr = _masking(REGISTERS, HAS_LEFT)
    if HAS_LEFT:
        return gl.inline_asm_elementwise(
            TEXT[0], TEXT[1], [x, last[:, None], first[:, None]], dtype=gl.float32, is_pure=False, pack=REGISTERS
        )
    else:
        return gl.inline_asm_elementwise(
            TEXT[0], TEXT[1], [x, last[:, None]], dtype=gl.float32, is_pure=False, pack=REGISTERS
        )


@functools.cache  # Gluon checks a layout for ten microseconds
def swizzled(bits: int, rank: int = 2, width: int = 128) -> gl.NVMMASharedLayout:
    """The shared-memory layout that TMA writes and wgmma reads: rows of `width` bytes, swizzled (0: plain)."""
    return gl.NVMMASharedLayout(swizzle_byte_width=width, element_bitwidth=bits, rank=rank)


_THREAD = threading.local()


def tensor_descriptor(tensor, block: list[int], width: int = 128) -> TensorDescriptor:
    """A TMA descriptor of the tensor in tiles of `block`; its last stride is 1, the others multiples of 16 bytes."""
    return Tiles(tensor.shape, tensor.stride(), tensor.dtype, block, width).of(tensor)


class Tiles:
    """How TMA cuts tensors of a shape, strides and dtype into tiles: what their descriptors have in common.

    `kind`, which Triton's own have not, is what a kernel that takes a descriptor is compiled for.
    """

    def __init__(self, shape, strides, dtype: torch.dtype, block: list[int], width: int = 128):
        layout = swizzled(8 * dtype.itemsize, len(block), width)
        self._common = {
            "shape": list(shape), "strides": list(strides), "block_shape": block, "layout": layout,
            "kind": (dtype, width, *block),
        }  # fmt: skip

    def of(self, tensor: torch.Tensor) -> TensorDescriptor:
        """The descriptor of what begins where the tensor begins."""
        if not hasattr(_THREAD, "has_context") and tensor.device.type == "cuda":
            # The driver encodes a descriptor in the thread's context, which a thread that has launched nothing yet
            # lacks (autograd has such). Any call of the runtime gives it one; this may stand in a graph's capture.
            torch.cuda.mem_get_info(tensor.device)
            _THREAD.has_context = True
        described = object.__new__(TensorDescriptor)  # its own checks take longer than the driver, which checks again
        described.__dict__ = {"base": tensor, **self._common}  # what else it has is the class's
        return described
