"""flash_attn.ops.triton.layer_norm: normalisation fused with what comes before it."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812  (torch's own habit)

from tilestack.kernels import layer_norm


def layer_norm_fn(
    x,
    weight,
    bias,
    residual=None,
    x1=None,
    weight1=None,
    bias1=None,
    eps=1e-6,
    dropout_p=0.0,
    rowscale=None,
    prenorm=False,
    residual_in_fp32=False,
    zero_centered_weight=False,
    is_rms_norm=False,
    return_dropout_mask=False,
    out_dtype=None,
    out=None,
    residual_out=None,
):
    """`tilestack.kernels.layer_norm` of drop(x * rowscale) + drop(x1) + residual.

    prenorm: also return that sum, in the dtype of residual (without one: x's, or float32 if residual_in_fp32).
    return_dropout_mask: also return what was kept of x, and of x1 (None without x1, or without dropout).
    out, residual_out: tensors that the results are copied to.

    Returns out, or a tuple of out, out1 (with weight1), the sum (with prenorm), and the two masks.
    """
    found = layer_norm(
        x, weight, bias, residual=residual, x1=x1, weight1=weight1, bias1=bias1, rowscale=rowscale, eps=eps,
        dropout_p=dropout_p, return_dropout_mask=return_dropout_mask, residual_in_fp32=residual_in_fp32,
        zero_centered_weight=zero_centered_weight, is_rms_norm=is_rms_norm, out_dtype=out_dtype,
    )  # fmt: skip
    results = [found.out if out is None else out.copy_(found.out)]
    if weight1 is not None:
        results.append(found.out1)
    if residual_out is not None:
        residual_out.copy_(found.residual_out)
    if prenorm:
        results.append(found.residual_out if residual_out is None else residual_out)
    if return_dropout_mask:
        results += [found.dropout_mask, found.dropout_mask1]
    return results[0] if len(results) == 1 else tuple(results)


def rms_norm_fn(
    x,
    weight,
    bias,
    residual=None,
    x1=None,
    weight1=None,
    bias1=None,
    eps=1e-6,
    dropout_p=0.0,
    rowscale=None,
    prenorm=False,
    residual_in_fp32=False,
    zero_centered_weight=False,
    return_dropout_mask=False,
    out_dtype=None,
    out=None,
    residual_out=None,
):
    """layer_norm_fn with the root mean square: no mean is subtracted."""
    return layer_norm_fn(
        x, weight, bias, residual, x1, weight1, bias1, eps, dropout_p, rowscale, prenorm, residual_in_fp32,
        zero_centered_weight, True, return_dropout_mask, out_dtype, out, residual_out,
    )  # fmt: skip


class RMSNorm(torch.nn.Module):
    """rms_norm_fn with a weight [hidden_size]; dropout in training alone."""

    def __init__(
        self, hidden_size, eps=1e-5, dropout_p=0.0, zero_centered_weight=False, device=None, dtype=None
    ):  # fmt: skip
        super().__init__()
        self.eps = eps
        self.drop = torch.nn.Dropout(dropout_p) if dropout_p > 0 else None
        self.zero_centered_weight = zero_centered_weight
        self.weight = torch.nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The weight multiplies by 1."""
        torch.nn.init.constant_(self.weight, 0.0 if self.zero_centered_weight else 1.0)

    def forward(self, x, residual=None, prenorm=False, residual_in_fp32=False):
        """Normalise x, after adding residual; with prenorm, (out, the sum)."""
        return rms_norm_fn(
            x, self.weight, self.bias, residual=residual, eps=self.eps,
            dropout_p=self.drop.p if self.drop is not None and self.training else 0.0,
            prenorm=prenorm, residual_in_fp32=residual_in_fp32, zero_centered_weight=self.zero_centered_weight,
        )  # fmt: skip


def layer_norm_linear_fn(
    x,
    norm_weight,
    norm_bias,
    linear_weight,
    linear_bias,
    residual=None,
    eps=1e-6,
    prenorm=False,
    residual_in_fp32=False,
    is_rms_norm=False,
):
    """layer_norm_fn, then a linear layer; with prenorm, (out, the sum). Under autocast, in its dtype.

    The normalised tensor is kept for backward, where flash-attn computes it anew.
    """
    dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
    normalised = layer_norm_fn(
        x, norm_weight, norm_bias, residual, eps=eps, prenorm=prenorm, residual_in_fp32=residual_in_fp32,
        is_rms_norm=is_rms_norm, out_dtype=dtype,
    )  # fmt: skip
    normalised, *summed = normalised if prenorm else (normalised,)
    linear_bias = None if linear_bias is None else linear_bias.to(dtype)
    out = F.linear(normalised, linear_weight.to(dtype), linear_bias)
    return (out, *summed) if prenorm else out


def layer_norm_ref(
    x,
    weight,
    bias,
    residual=None,
    x1=None,
    weight1=None,
    bias1=None,
    eps=1e-6,
    dropout_p=0.0,
    rowscale=None,
    prenorm=False,
    zero_centered_weight=False,
    dropout_mask=None,
    dropout_mask1=None,
    upcast=False,
):
    """layer_norm_fn in plain torch, with given dropout masks; upcast computes in float32."""
    return _ref(
        F.layer_norm, x, weight, bias, residual, x1, weight1, bias1, eps, dropout_p, rowscale, prenorm,
        zero_centered_weight, dropout_mask, dropout_mask1, upcast,
    )  # fmt: skip


def rms_norm_ref(
    x,
    weight,
    bias,
    residual=None,
    x1=None,
    weight1=None,
    bias1=None,
    eps=1e-6,
    dropout_p=0.0,
    rowscale=None,
    prenorm=False,
    zero_centered_weight=False,
    dropout_mask=None,
    dropout_mask1=None,
    upcast=False,
):
    """rms_norm_fn in plain torch, with given dropout masks; upcast computes in float32."""
    return _ref(
        _rms_norm, x, weight, bias, residual, x1, weight1, bias1, eps, dropout_p, rowscale, prenorm,
        zero_centered_weight, dropout_mask, dropout_mask1, upcast,
    )  # fmt: skip


def _ref(
    normalise, x, weight, bias, residual, x1, weight1, bias1, eps, dropout_p, rowscale, prenorm, zero_centered_weight,
    dropout_mask, dropout_mask1, upcast,
):  # fmt: skip
    dtype = x.dtype
    if upcast:
        x, weight, bias, residual, x1, weight1, bias1 = (
            None if each is None else each.float() for each in (x, weight, bias, residual, x1, weight1, bias1)
        )
    if zero_centered_weight:
        weight, weight1 = weight + 1, None if weight1 is None else weight1 + 1
    if rowscale is not None:
        x = x * rowscale[..., None]
    x = _drop(x, dropout_p, dropout_mask)
    if x1 is not None:
        x = x + _drop(x1, dropout_p, dropout_mask1)
    if residual is not None:
        x = (x + residual).to(x.dtype)
    outputs = [normalise(x.to(weight.dtype), x.shape[-1:], weight, bias, eps).to(dtype)]
    if weight1 is not None:
        outputs.append(normalise(x.to(weight1.dtype), x.shape[-1:], weight1, bias1, eps).to(dtype))
    if prenorm:
        outputs.append(x)
    return outputs[0] if len(outputs) == 1 else tuple(outputs)


def _drop(x: torch.Tensor, dropout_p: float, mask: torch.Tensor | None) -> torch.Tensor:
    if not dropout_p:
        return x
    return F.dropout(x, dropout_p) if mask is None else x.masked_fill(~mask, 0) / (1 - dropout_p)


def _rms_norm(x, shape, weight, bias, eps):
    out = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight
    return out if bias is None else out + bias
