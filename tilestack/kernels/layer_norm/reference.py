"""layer_norm in plain torch: the definition. The sum is rounded to residual_out's dtype before it is normalised."""

from __future__ import annotations

import torch

from tilestack.kernels.attention.dropout import dropout_mask
from tilestack.kernels.dispatch import Call
from tilestack.kernels.reference_autograd import gradients

AUXILIARY = ()
SAVED = ("x", "weight", "bias", "residual", "x1", "weight1", "bias1", "rowscale", "dropout_seed")


def refuses(call: Call) -> str | None:
    return None


def compute(x, weight, bias, residual, x1, weight1, bias1, rowscale, dropout_seed, params):
    wide = torch.promote_types(x.dtype, torch.float32)
    summed = x.to(wide)
    masks = [x.new_empty(0, dtype=torch.bool)] * 2
    if rowscale is not None:
        summed = summed * rowscale.to(wide)[..., None]
    if params.dropout_p:
        masks[0] = _mask(x, dropout_seed, params.dropout_p, 0)
        summed = summed * masks[0] / (1 - params.dropout_p)
    if x1 is not None:
        second = x1.to(wide)
        if params.dropout_p:
            masks[1] = _mask(x, dropout_seed, params.dropout_p, 1)
            second = second * masks[1] / (1 - params.dropout_p)
        summed = summed + second
    if residual is not None:
        summed = summed + residual.to(wide)
    residual_out = x.new_empty(0)
    if params.residual_dtype:
        residual_out = summed.to(params.dtype("residual_dtype"))
        summed = residual_out.to(wide)
    if not params.is_rms_norm:
        summed = summed - summed.mean(-1, keepdim=True)
    normalised = summed * torch.rsqrt(summed.square().mean(-1, keepdim=True) + params.eps)
    out = _affine(normalised, weight, bias, params)
    out1 = _affine(normalised, weight1, bias1, params) if weight1 is not None else out.new_empty(0)
    if not params.return_dropout_mask:
        masks = [each.new_empty(0) for each in masks]
    return out, out1, residual_out, *masks


def _mask(x: torch.Tensor, dropout_seed: torch.Tensor, dropout_p: float, index: int) -> torch.Tensor:
    rows = x.shape[:-1].numel()
    return dropout_mask(dropout_seed, dropout_p, 1, 1, rows, x.shape[-1], first=index).view(x.shape)


def _affine(normalised: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, params) -> torch.Tensor:
    weight = weight.to(normalised.dtype) + params.zero_centered_weight
    out = normalised * weight
    if bias is not None:
        out = out + bias.to(normalised.dtype)
    return out.to(params.dtype("out_dtype"))


def forward(x, weight, bias, residual, x1, weight1, bias1, rowscale, dropout_seed, params):
    return compute(x, weight, bias, residual, x1, weight1, bias1, rowscale, dropout_seed, params)


def backward(
    dout, dout1, dresidual_out, dmask, dmask1,
    x, weight, bias, residual, x1, weight1, bias1, rowscale, dropout_seed, *, needs, params,
):  # fmt: skip
    named = {
        "x": x, "weight": weight, "bias": bias, "residual": residual, "x1": x1, "weight1": weight1, "bias1": bias1,
        "rowscale": rowscale, "dropout_seed": dropout_seed,
    }  # fmt: skip
    return gradients(compute, named, (dout, dout1, dresidual_out, None, None), needs, params)
