"""rms_norm in Triton.

Forward: a program normalises one row at a time, the whole row in registers, and strides over the rows.
Backward: one program per multiprocessor strides over the rows and keeps its share of dweight in float32 registers;
weight_shares sums the shares in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tilestack.kernels import launch
from tilestack.kernels.dispatch import Call
from tilestack.kernels.rms_norm.configs import MAX_HIDDEN, backward_programs, warps
from tilestack.kernels.weight_shares import sum_shares

AUXILIARY = ("rstd",)
SAVED = ("residual_out|x", "weight", "rstd")


def refuses(call: Call) -> str | None:
    hidden = call.shape("x")[-1]
    if call.dtype("x") == torch.float64:
        return "has no float64 path"
    if hidden > MAX_HIDDEN:
        return f"keeps a row in registers, up to H = {MAX_HIDDEN}, got {hidden}"
    return None


@triton.jit(do_not_specialize=["n_rows"])
def rms_norm_fwd_kernel(
    x_ptr, residual_ptr, weight_ptr, out_ptr, summed_ptr, rstd_ptr, stride_x, stride_residual, n_rows, eps,
    H: tl.constexpr, BLOCK_H: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
):  # fmt: skip
    offs = tl.arange(0, BLOCK_H)
    mask = offs < H
    weight = tl.load(weight_ptr + offs, mask=mask, other=0.0)
    for row in range(tl.program_id(0), n_rows, tl.num_programs(0)):
        row = tl.cast(row, tl.int64)
        x = tl.load(x_ptr + row * stride_x + offs, mask=mask, other=0.0)
        if HAS_RESIDUAL:
            residual = tl.load(residual_ptr + row * stride_residual + offs, mask=mask, other=0.0)
            x = (x.to(tl.float32) + residual.to(tl.float32)).to(x.dtype)
            tl.store(summed_ptr + row * H + offs, x, mask=mask)
        wide = x.to(tl.float32)
        rstd = tl.rsqrt(tl.sum(wide * wide, 0) / H + eps)
        tl.store(rstd_ptr + row, rstd)
        normalised = (wide * rstd).to(x.dtype)
        tl.store(out_ptr + row * H + offs, (normalised.to(tl.float32) * weight.to(tl.float32)).to(x.dtype), mask=mask)


@triton.jit(do_not_specialize=["n_rows"])
def rms_norm_bwd_kernel(
    dout_ptr, dsummed_ptr, summed_ptr, weight_ptr, rstd_ptr, dx_ptr, dweight_shares_ptr,
    stride_dout, stride_dsummed, stride_summed, n_rows,
    H: tl.constexpr, BLOCK_H: tl.constexpr, HAS_DSUMMED: tl.constexpr, HAS_DOUT: tl.constexpr,
):  # fmt: skip
    # with n = x * rstd:  dx = rstd * (g - n * mean(g * n)),  g = dout * weight
    offs = tl.arange(0, BLOCK_H)
    mask = offs < H
    weight = tl.load(weight_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    dweight = tl.zeros([BLOCK_H], tl.float32)
    for row in range(tl.program_id(0), n_rows, tl.num_programs(0)):
        row = tl.cast(row, tl.int64)
        dx = tl.zeros([BLOCK_H], tl.float32)
        if HAS_DOUT:
            rstd = tl.load(rstd_ptr + row)
            x = tl.load(summed_ptr + row * stride_summed + offs, mask=mask, other=0.0)
            dout = tl.load(dout_ptr + row * stride_dout + offs, mask=mask, other=0.0).to(tl.float32)
            normalised = x.to(tl.float32) * rstd
            dweight += dout * normalised.to(x.dtype).to(tl.float32)
            g = dout * weight
            dx = rstd * (g - normalised * (tl.sum(g * normalised, 0) / H))
        if HAS_DSUMMED:
            dx += tl.load(dsummed_ptr + row * stride_dsummed + offs, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + row * H + offs, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    tl.store(dweight_shares_ptr + tl.program_id(0) * H + offs, dweight, mask=mask)


def fake_auxiliary(x, weight, residual, params):
    return (x.new_empty(x.shape[:-1], dtype=torch.float32),)


def forward(x, weight, residual, params):
    hidden = x.shape[-1]
    out = x.new_empty(x.shape)
    residual_out = x.new_empty(x.shape if residual is not None else (0,))
    rstd = x.new_empty(x.shape[:-1], dtype=torch.float32)
    if x.numel() == 0:
        return out, residual_out, rstd
    flat = launch.rows(x)
    flat_residual = flat if residual is None else launch.rows(residual)
    grid = (min(flat.shape[0], 65535 * 8),)
    with launch.on_device(x):
        launch.run(
            rms_norm_fwd_kernel, grid,
            flat, flat_residual, weight.contiguous(), out, residual_out, rstd,
            flat.stride(0), flat_residual.stride(0), flat.shape[0], params.eps,
            H=hidden, BLOCK_H=launch.next_power_of_2(hidden), HAS_RESIDUAL=residual is not None,
            num_warps=warps(hidden),
        )  # fmt: skip
    return out, residual_out, rstd


def backward(dout, dresidual_out, summed, weight, rstd, *, needs, params):
    hidden = summed.shape[-1]
    dx = summed.new_empty(summed.shape)
    flat = launch.rows(summed)
    n_programs = backward_programs(flat.shape[0], launch.multiprocessors(summed))
    shares = summed.new_empty((n_programs, hidden), dtype=torch.float32)
    flat_dout = flat if dout is None else launch.rows(dout)
    flat_dsummed = flat if dresidual_out is None else launch.rows(dresidual_out)
    with launch.on_device(summed):
        launch.run(
            rms_norm_bwd_kernel, (n_programs,),
            flat_dout, flat_dsummed, flat, weight.contiguous(), rstd, dx, shares,
            flat_dout.stride(0), flat_dsummed.stride(0), flat.stride(0), flat.shape[0],
            H=hidden, BLOCK_H=launch.next_power_of_2(hidden),
            HAS_DSUMMED=dresidual_out is not None, HAS_DOUT=dout is not None, num_warps=warps(hidden),
        )  # fmt: skip
    found = {"x": dx, "residual": dx}  # x + residual: the contract asks for one of them alone
    if "weight" in needs:
        (found["weight"],) = sum_shares(shares, weight)
    return tuple(found[name] for name in needs)
