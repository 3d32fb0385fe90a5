"""layer_norm in Triton.

Forward: a program normalises one row at a time, the whole row in registers, and strides over the rows. The row is
normalised before it is rounded to residual_out.
Backward: a few programs a multiprocessor stride over the rows and keep their shares of the gradients of weights and
biases in float32 registers; weight_shares sums the shares in a fixed order. What was dropped is drawn anew.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tilestack.kernels import launch
from tilestack.kernels.attention.dropout import threshold
from tilestack.kernels.dispatch import Call
from tilestack.kernels.layer_norm.op import outputs
from tilestack.kernels.rms_norm.configs import MAX_HIDDEN, backward_programs, warps  # the traffic is the same
from tilestack.kernels.weight_shares import sum_shares

AUXILIARY = ("mean", "rstd")
SAVED = ("residual_out|x", "weight", "bias", "weight1", "bias1", "rowscale", "dropout_seed", "mean", "rstd")


def refuses(call: Call) -> str | None:
    hidden = call.shape("x")[-1]
    if call.dtype("x") == torch.float64:
        return "has no float64 path"
    if hidden > MAX_HIDDEN:
        return f"keeps a row in registers, up to H = {MAX_HIDDEN}, got {hidden}"
    return None


@triton.jit
def _kept(seed_ptr, row, offs, INDEX: tl.constexpr, keep_below):
    """Which elements of a row dropout keeps: attention/dropout.py of query `row`, key `offs`, sequence INDEX."""
    seed = tl.load(seed_ptr)
    offset = tl.load(seed_ptr + 1).to(tl.int32)
    zero = offs * 0
    w0, w1, w2, w3 = tl.philox(seed, offs // 8, zero + row.to(tl.int32), zero + INDEX, zero + offset, 7)
    place = (offs % 8) // 2
    word = tl.where(place == 0, w0, tl.where(place == 1, w1, tl.where(place == 2, w2, w3)))
    bits = (word.to(tl.uint32, bitcast=True) >> ((offs % 2) * 16).to(tl.uint32)) & 0xFFFF
    return bits.to(tl.int32) < keep_below


@triton.jit
def _scaled(x, row, offs, seed_ptr, keep_below, keep_scale, INDEX: tl.constexpr, HAS_DROPOUT: tl.constexpr):
    if HAS_DROPOUT:
        x = tl.where(_kept(seed_ptr, row, offs, INDEX, keep_below), x * keep_scale, 0.0)
    return x


@triton.jit
def _load(ptr, offs, mask, EXISTS: tl.constexpr, BLOCK_H: tl.constexpr):
    if EXISTS:
        return tl.load(ptr + offs, mask=mask, other=0.0).to(tl.float32)
    return tl.zeros([BLOCK_H], tl.float32)


@triton.jit(do_not_specialize=["n_rows"])
def layer_norm_fwd_kernel(
    x_ptr, residual_ptr, x1_ptr, weight_ptr, bias_ptr, weight1_ptr, bias1_ptr, rowscale_ptr, seed_ptr,
    out_ptr, out1_ptr, summed_ptr, mask_ptr, mask1_ptr, mean_ptr, rstd_ptr,
    stride_x, stride_residual, stride_x1, n_rows, eps, keep_below, keep_scale,
    H: tl.constexpr, BLOCK_H: tl.constexpr, IS_RMS: tl.constexpr, UNIT: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, HAS_X1: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_WEIGHT1: tl.constexpr,
    HAS_BIAS1: tl.constexpr, HAS_ROWSCALE: tl.constexpr, HAS_DROPOUT: tl.constexpr, STORE_SUM: tl.constexpr,
    STORE_MASK: tl.constexpr,
):  # fmt: skip
    offs = tl.arange(0, BLOCK_H)
    mask = offs < H
    weight = _load(weight_ptr, offs, mask, True, BLOCK_H) + UNIT
    bias = _load(bias_ptr, offs, mask, HAS_BIAS, BLOCK_H)
    weight1 = _load(weight1_ptr, offs, mask, HAS_WEIGHT1, BLOCK_H) + UNIT
    bias1 = _load(bias1_ptr, offs, mask, HAS_BIAS1, BLOCK_H)
    for index in range(tl.program_id(0), n_rows, tl.num_programs(0)):
        row = tl.cast(index, tl.int64)
        summed = tl.load(x_ptr + row * stride_x + offs, mask=mask, other=0.0).to(tl.float32)
        if HAS_ROWSCALE:
            summed *= tl.load(rowscale_ptr + row).to(tl.float32)
        summed = _scaled(summed, row, offs, seed_ptr, keep_below, keep_scale, 0, HAS_DROPOUT)
        if HAS_X1:
            x1 = tl.load(x1_ptr + row * stride_x1 + offs, mask=mask, other=0.0).to(tl.float32)
            summed += _scaled(x1, row, offs, seed_ptr, keep_below, keep_scale, 1, HAS_DROPOUT)
        if HAS_RESIDUAL:
            summed += tl.load(residual_ptr + row * stride_residual + offs, mask=mask, other=0.0).to(tl.float32)
        if STORE_SUM:
            tl.store(summed_ptr + row * H + offs, summed.to(summed_ptr.dtype.element_ty), mask=mask)
        if STORE_MASK:
            tl.store(mask_ptr + row * H + offs, _kept(seed_ptr, row, offs, 0, keep_below), mask=mask)
            if HAS_X1:
                tl.store(mask1_ptr + row * H + offs, _kept(seed_ptr, row, offs, 1, keep_below), mask=mask)
        centred = summed
        if not IS_RMS:
            mean = tl.sum(summed, 0) / H
            tl.store(mean_ptr + row, mean)
            centred = tl.where(mask, summed - mean, 0.0)
        rstd = tl.rsqrt(tl.sum(centred * centred, 0) / H + eps)
        tl.store(rstd_ptr + row, rstd)
        normalised = centred * rstd
        out = normalised * weight + bias
        tl.store(out_ptr + row * H + offs, out.to(out_ptr.dtype.element_ty), mask=mask)
        if HAS_WEIGHT1:
            out1 = normalised * weight1 + bias1
            tl.store(out1_ptr + row * H + offs, out1.to(out1_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["n_rows"])
def layer_norm_bwd_kernel(
    dout_ptr, dout1_ptr, dsummed_ptr, summed_ptr, weight_ptr, weight1_ptr, rowscale_ptr, seed_ptr, mean_ptr, rstd_ptr,
    dx_ptr, dresidual_ptr, dx1_ptr, shares_ptr,
    stride_dout, stride_dout1, stride_dsummed, stride_summed, n_rows, keep_below, keep_scale,
    H: tl.constexpr, BLOCK_H: tl.constexpr, IS_RMS: tl.constexpr, UNIT: tl.constexpr,
    HAS_DOUT: tl.constexpr, HAS_DOUT1: tl.constexpr, HAS_DSUMMED: tl.constexpr, HAS_ROWSCALE: tl.constexpr,
    HAS_DROPOUT: tl.constexpr, WANT_DRESIDUAL: tl.constexpr, WANT_DX1: tl.constexpr, WANT_BIAS: tl.constexpr,
):  # fmt: skip
    # with n = (s - mean) * rstd and g = dout * weight + dout1 * weight1:
    #   ds = rstd * (g - mean(g) - n * mean(g * n)) + dresidual_out,   without mean(g) for the root mean square
    offs = tl.arange(0, BLOCK_H)
    mask = offs < H
    weight = _load(weight_ptr, offs, mask, HAS_DOUT, BLOCK_H) + UNIT
    weight1 = _load(weight1_ptr, offs, mask, HAS_DOUT1, BLOCK_H) + UNIT
    dweight = tl.zeros([BLOCK_H], tl.float32)
    dbias = tl.zeros([BLOCK_H], tl.float32)
    dweight1 = tl.zeros([BLOCK_H], tl.float32)
    dbias1 = tl.zeros([BLOCK_H], tl.float32)
    for index in range(tl.program_id(0), n_rows, tl.num_programs(0)):
        row = tl.cast(index, tl.int64)
        dout = _load(dout_ptr + row * stride_dout, offs, mask, HAS_DOUT, BLOCK_H)
        dout1 = _load(dout1_ptr + row * stride_dout1, offs, mask, HAS_DOUT1, BLOCK_H)
        rstd = tl.load(rstd_ptr + row)
        summed = tl.load(summed_ptr + row * stride_summed + offs, mask=mask, other=0.0).to(tl.float32)
        if not IS_RMS:
            summed = tl.where(mask, summed - tl.load(mean_ptr + row), 0.0)
        normalised = summed * rstd
        dweight += dout * normalised
        dweight1 += dout1 * normalised
        if WANT_BIAS:
            dbias += dout
            dbias1 += dout1
        g = dout * weight + dout1 * weight1
        centred = g - normalised * (tl.sum(g * normalised, 0) / H)
        if not IS_RMS:
            centred -= tl.sum(g, 0) / H
        ds = centred * rstd
        if HAS_DSUMMED:
            ds += tl.load(dsummed_ptr + row * stride_dsummed + offs, mask=mask, other=0.0).to(tl.float32)
        if WANT_DRESIDUAL:
            tl.store(dresidual_ptr + row * H + offs, ds.to(dresidual_ptr.dtype.element_ty), mask=mask)
        if WANT_DX1:
            dx1 = _scaled(ds, row, offs, seed_ptr, keep_below, keep_scale, 1, HAS_DROPOUT)
            tl.store(dx1_ptr + row * H + offs, dx1.to(dx1_ptr.dtype.element_ty), mask=mask)
        dx = _scaled(ds, row, offs, seed_ptr, keep_below, keep_scale, 0, HAS_DROPOUT)
        if HAS_ROWSCALE:
            dx *= tl.load(rowscale_ptr + row).to(tl.float32)
        tl.store(dx_ptr + row * H + offs, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    share = shares_ptr + tl.program_id(0) * (4 * H) + offs  # [programs, weight bias weight1 bias1, H]
    tl.store(share, dweight, mask=mask)
    if WANT_BIAS:
        tl.store(share + H, dbias, mask=mask)
    if HAS_DOUT1:
        tl.store(share + 2 * H, dweight1, mask=mask)
        if WANT_BIAS:
            tl.store(share + 3 * H, dbias1, mask=mask)


def fake_auxiliary(x, weight, bias, residual, x1, weight1, bias1, rowscale, dropout_seed, params):
    return _statistics(x, params)


def _statistics(x: torch.Tensor, params) -> tuple[torch.Tensor, torch.Tensor]:
    """Uninitialised mean (of shape [0] for the root mean square) and rstd, one a row."""
    rows = x.shape[:-1]
    return x.new_empty((0,) if params.is_rms_norm else rows, dtype=torch.float32), x.new_empty(
        rows, dtype=torch.float32
    )


def forward(x, weight, bias, residual, x1, weight1, bias1, rowscale, dropout_seed, params):
    results = outputs(x, x1 is not None, weight1 is not None, params)
    mean, rstd = _statistics(x, params)
    if x.numel() == 0:
        return *results, mean, rstd
    hidden = x.shape[-1]
    flat, flat_residual, flat_x1 = (launch.rows(x if each is None else each) for each in (x, residual, x1))
    vectors = ((weight if each is None else each).contiguous() for each in (weight, bias, weight1, bias1))
    with launch.on_device(x):
        launch.run(
            layer_norm_fwd_kernel, (min(flat.shape[0], 65535 * 8),),
            flat, flat_residual, flat_x1, *vectors, *_row_inputs(rstd, rowscale, dropout_seed), *results, mean, rstd,
            flat.stride(0), flat_residual.stride(0), flat_x1.stride(0), flat.shape[0], params.eps, *_dropout(params),
            **_constants(hidden, params), HAS_RESIDUAL=residual is not None, HAS_X1=x1 is not None,
            HAS_BIAS=bias is not None, HAS_WEIGHT1=weight1 is not None, HAS_BIAS1=bias1 is not None,
            HAS_ROWSCALE=rowscale is not None, STORE_SUM=bool(params.residual_dtype),
            STORE_MASK=params.return_dropout_mask,
        )  # fmt: skip
    return *results, mean, rstd


def backward(
    dout, dout1, dresidual_out, dmask, dmask1,
    summed, weight, bias, weight1, bias1, rowscale, dropout_seed, mean, rstd, *, needs, params,
):  # fmt: skip
    hidden = summed.shape[-1]
    found = {"x": summed.new_empty(summed.shape, dtype=params.dtype("x_dtype"))}
    if "residual" in needs:
        found["residual"] = torch.empty_like(summed, memory_format=torch.contiguous_format)
    if "x1" in needs:
        found["x1"] = torch.empty_like(found["x"])
    flat = launch.rows(summed)
    n_programs = backward_programs(flat.shape[0], launch.multiprocessors(summed))
    shares = summed.new_empty((n_programs, 4, hidden), dtype=torch.float32)
    grads = [launch.rows(summed if each is None else each) for each in (dout, dout1, dresidual_out)]
    with launch.on_device(summed):
        launch.run(
            layer_norm_bwd_kernel, (n_programs,),
            *grads, flat, weight.contiguous(), (weight if weight1 is None else weight1).contiguous(),
            *_row_inputs(rstd, rowscale, dropout_seed), mean, rstd,
            found["x"], found.get("residual", flat), found.get("x1", flat), shares,
            *(each.stride(0) for each in grads), flat.stride(0), flat.shape[0], *_dropout(params),
            **_constants(hidden, params), HAS_DOUT=dout is not None, HAS_DOUT1=dout1 is not None,
            HAS_DSUMMED=dresidual_out is not None, HAS_ROWSCALE=rowscale is not None,
            WANT_DRESIDUAL="residual" in needs, WANT_DX1="x1" in needs,
            WANT_BIAS="bias" in needs or "bias1" in needs,
        )  # fmt: skip
    for index, (name, tensor) in enumerate(
        (("weight", weight), ("bias", bias), ("weight1", weight1), ("bias1", bias1))
    ):
        if name in needs:
            flows = dout1 is not None or index < 2
            found[name] = sum_shares(shares[:, index], tensor)[0] if flows else torch.zeros_like(tensor)
    return tuple(found[name] for name in needs)


def _row_inputs(
    rstd: torch.Tensor, rowscale: torch.Tensor | None, dropout_seed: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """rowscale and dropout_seed, or, where a call has none, what stands in for a pointer that is not read."""
    return rstd if rowscale is None else rowscale.contiguous(), rstd if dropout_seed is None else dropout_seed


def _dropout(params) -> tuple[int, float]:
    """The bits below which dropout keeps, and what it multiplies by."""
    return threshold(params.dropout_p), 1 / (1 - params.dropout_p)


def _constants(hidden: int, params) -> dict:
    return {
        "H": hidden,
        "BLOCK_H": launch.next_power_of_2(hidden),
        "IS_RMS": params.is_rms_norm,
        "UNIT": 1.0 if params.zero_centered_weight else 0.0,
        "HAS_DROPOUT": params.dropout_p > 0,
        "num_warps": warps(hidden),
    }
