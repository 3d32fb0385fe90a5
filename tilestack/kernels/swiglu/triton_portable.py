"""swiglu in Triton: forward and backward are one launch each, elementwise, with strided rows read in place."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tilestack.kernels import launch
from tilestack.kernels.dispatch import Call
from tilestack.kernels.swiglu.configs import block, warps

AUXILIARY = ()
SAVED = ("gate", "up")


def refuses(call: Call) -> str | None:
    if call.dtype("gate") == torch.float64:
        return "has no float64 path"
    return None


@triton.jit(do_not_specialize=["n_blocks"])
def swiglu_fwd_kernel(gate_ptr, up_ptr, out_ptr, stride_gate, stride_up, width, n_blocks, BLOCK: tl.constexpr):
    row = tl.cast(tl.program_id(0) // n_blocks, tl.int64)
    offs = tl.cast(tl.program_id(0) % n_blocks, tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < width
    gate = tl.load(gate_ptr + row * stride_gate + offs, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * stride_up + offs, mask=mask, other=0.0).to(tl.float32)
    out = gate / (1 + tl.exp(-gate)) * up
    tl.store(out_ptr + row * width + offs, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["n_blocks"])
def swiglu_bwd_kernel(
    dout_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, stride_dout, stride_gate, stride_up, width, n_blocks,
    BLOCK: tl.constexpr,
):  # fmt: skip
    # with s = sigmoid(gate):  dup = dout * gate * s,  dgate = dout * up * s * (1 + gate * (1 - s))
    row = tl.cast(tl.program_id(0) // n_blocks, tl.int64)
    offs = tl.cast(tl.program_id(0) % n_blocks, tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < width
    dout = tl.load(dout_ptr + row * stride_dout + offs, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * stride_gate + offs, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * stride_up + offs, mask=mask, other=0.0).to(tl.float32)
    s = 1 / (1 + tl.exp(-gate))
    dgate = dout * up * s * (1 + gate * (1 - s))
    dup = dout * gate * s
    tl.store(dgate_ptr + row * width + offs, dgate.to(dgate_ptr.dtype.element_ty), mask=mask)
    tl.store(dup_ptr + row * width + offs, dup.to(dup_ptr.dtype.element_ty), mask=mask)


def _rows(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Each as [rows, width], last dimension contiguous: one long row where all are contiguous."""
    if all(each.is_contiguous() for each in tensors):
        return [each.view(1, -1) for each in tensors]
    return [launch.rows(each) for each in tensors]


def _launch(kernel, strided: list[torch.Tensor], outputs: tuple[torch.Tensor, ...]) -> None:
    """Run a kernel that reads `strided` (all [rows, width]) and writes the contiguous `outputs`."""
    n_rows, width = strided[0].shape
    BLOCK = block(width)
    n_blocks = launch.cdiv(width, BLOCK)
    strides = [each.stride(0) for each in strided]
    with launch.on_device(strided[0]):
        launch.run(
            kernel, (n_rows * n_blocks,),
            *strided, *outputs, *strides, width, n_blocks, BLOCK=BLOCK, num_warps=warps(BLOCK)
        )  # fmt: skip


def forward(gate, up, params):
    out = gate.new_empty(gate.shape)
    if gate.numel():
        _launch(swiglu_fwd_kernel, _rows(gate, up), (out,))
    return (out,)


def backward(dout, gate, up, *, needs, params):
    found = {"gate": gate.new_empty(gate.shape), "up": up.new_empty(up.shape)}
    if gate.numel():
        _launch(swiglu_bwd_kernel, _rows(dout, gate, up), tuple(found.values()))
    return tuple(found[name] for name in needs)
