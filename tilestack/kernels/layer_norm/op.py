"""Layer or root-mean-square normalisation of a sum, with one or two weights: the contract.

    s = drop(x * rowscale) + drop(x1) + residual                          drop: dropout; what is absent is left out
    n = (s - mean(s)) / sqrt(mean((s - mean(s))^2) + eps)                 or s / sqrt(mean(s^2) + eps)
    out = n * weight + bias,   out1 = n * weight1 + bias1                 (1 + weight where it is centred at zero)

This is what flash-attn's fused layer_norm_fn computes: add, drop and normalise of a transformer block, or of a parallel
one with two normalisations. `rms_norm` is the model's own, with transformers' rounding. Float32 inside.

Sources: Ba et al., "Layer Normalization" (2016), eq. 3-4; Zhang and Sennrich, "Root Mean Square Layer Normalization"
(2019), eq. 4.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tilestack.kernels import checks
from tilestack.kernels.attention.dropout import draw_seed
from tilestack.kernels.dispatch import Op, portable, reference
from tilestack.kernels.registration import Contract


@dataclass(frozen=True)
class LayerNormParams:
    """x_dtype, out_dtype: names. residual_dtype: the name of residual_out's, "" where s is x itself."""

    eps: float
    dropout_p: float
    is_rms_norm: bool
    zero_centered_weight: bool
    return_dropout_mask: bool
    x_dtype: str
    out_dtype: str
    residual_dtype: str

    def dtype(self, field: str) -> torch.dtype:
        return getattr(torch, getattr(self, field))


def _fake(x, weight, bias, residual, x1, weight1, bias1, rowscale, dropout_seed, params) -> tuple[torch.Tensor, ...]:
    return outputs(x, x1 is not None, weight1 is not None, params)


def outputs(x: torch.Tensor, has_x1: bool, has_weight1: bool, params: LayerNormParams) -> tuple[torch.Tensor, ...]:
    """Uninitialised out, out1, residual_out, dropout_mask and dropout_mask1, of shape [0] where a call has none."""

    def empty(exists: bool, dtype: torch.dtype) -> torch.Tensor:
        return x.new_empty(x.shape if exists else (0,), dtype=dtype)

    out_dtype = params.dtype("out_dtype")
    return (
        empty(True, out_dtype),
        empty(has_weight1, out_dtype),
        empty(bool(params.residual_dtype), params.dtype("residual_dtype") if params.residual_dtype else x.dtype),
        empty(params.return_dropout_mask, torch.bool),
        empty(params.return_dropout_mask and has_x1, torch.bool),
    )


CONTRACT = Contract(
    "layer_norm",
    ("x", "weight", "bias?", "residual?", "x1?", "weight1?", "bias1?", "rowscale?", "dropout_seed?"),
    ("out", "out1", "residual_out", "dropout_mask", "dropout_mask1"),
    LayerNormParams,
    _fake,
    gradient_like=(("residual", "residual_out"), ("x1", "residual_out")),
    gradient_dtypes=(("x", "x_dtype"), ("x1", "x_dtype")),
    constants=("dropout_mask", "dropout_mask1"),
)
OP = Op(CONTRACT, (portable("layer_norm"), reference("layer_norm")))


@dataclass(frozen=True)
class LayerNormOutput:
    """Everything that a call has: None where it has none.

    out, out1: like x, in out_dtype. residual_out: the sum s; x itself where nothing was added, scaled or dropped.
    dropout_mask, dropout_mask1: bool, like x: True where x and x1 were kept.
    """

    out: torch.Tensor
    out1: torch.Tensor | None
    residual_out: torch.Tensor
    dropout_mask: torch.Tensor | None
    dropout_mask1: torch.Tensor | None


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    residual: torch.Tensor | None = None,
    x1: torch.Tensor | None = None,
    weight1: torch.Tensor | None = None,
    bias1: torch.Tensor | None = None,
    rowscale: torch.Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    dropout_seed: torch.Tensor | None = None,
    return_dropout_mask: bool = False,
    residual_in_fp32: bool = False,
    zero_centered_weight: bool = False,
    is_rms_norm: bool = False,
    out_dtype: torch.dtype | None = None,
    implementation: str | None = None,
) -> LayerNormOutput:
    """Normalise the last dimension of a sum.

    x: [..., H], floating point, any strides.
    weight, bias: [H], floating point.
    residual: the shape of x, any floating dtype, which is then residual_out's.
    x1: like x: a second addend. Not together with rowscale.
    weight1, bias1: [H]: a second output of the same normalised sum.
    rowscale: [...], a factor for each row of x, floating point, without gradient.
    dropout_p: in [0, 1): this share of x's elements (after rowscale), and of x1's, is dropped; the rest is divided by
        1 - dropout_p.
    dropout_seed: int64 [2], on the device of x, fixes what is dropped: what attention's dropout of rows and columns
        drops (attention/dropout.py) as sequence 0, for x, and 1, for x1. None draws it.
    return_dropout_mask: also return what was kept.
    residual_in_fp32: without a residual, residual_out is float32.
    zero_centered_weight: 1 is added to the weights.
    is_rms_norm: no mean is subtracted.
    out_dtype: of out and out1; None is x's.
    implementation: "tilestack-triton" or "reference"; None chooses.

    Differentiable in x, weight, bias, residual, x1, weight1 and bias1, through out, out1 and residual_out. Raises
    ValueError for wrong shapes, dtypes, devices or numbers.
    """
    _check(x, weight, bias, residual, x1, weight1, bias1, rowscale, eps, dropout_p)
    if dropout_p and dropout_seed is None:
        dropout_seed = draw_seed(x.device)
    params = LayerNormParams(
        eps, float(dropout_p), is_rms_norm, zero_centered_weight, return_dropout_mask and dropout_p > 0,
        _name(x.dtype), _name(out_dtype or x.dtype),
        _residual_dtype(x, residual, residual_in_fp32, dropout_p > 0 or x1 is not None or rowscale is not None),
    )  # fmt: skip
    rowscale = None if rowscale is None else rowscale.detach()
    tensors = (x, weight, bias, residual, x1, weight1, bias1, rowscale, dropout_seed if dropout_p else None)
    out, out1, residual_out, mask, mask1 = OP(tensors, params, implementation)
    return LayerNormOutput(
        out,
        None if weight1 is None else out1,
        residual_out if params.residual_dtype else x,
        mask if params.return_dropout_mask else None,
        mask1 if params.return_dropout_mask and x1 is not None else None,
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _residual_dtype(x: torch.Tensor, residual: torch.Tensor | None, in_fp32: bool, changed: bool) -> str:
    if residual is not None:
        return _name(residual.dtype)
    dtype = torch.promote_types(x.dtype, torch.float32) if in_fp32 else x.dtype
    return _name(dtype) if changed or dtype != x.dtype else ""


def _check(x, weight, bias, residual, x1, weight1, bias1, rowscale, eps, dropout_p) -> None:
    op = "layer_norm"
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"{op}: x must be [..., H], H at least 1, got {list(x.shape)}")
    checks.at_least(op, "eps", eps, 0)
    if not 0 <= dropout_p < 1:
        raise ValueError(f"{op}: dropout_p must be at least 0 and less than 1, got {dropout_p}")
    rows = {"weight": weight, "bias": bias, "weight1": weight1, "bias1": bias1}
    whole = {"residual": residual, "x1": x1}
    checks.floating(op, x=x, rowscale=rowscale, **rows, **whole)
    checks.same_device(op, x=x, rowscale=rowscale, **rows, **whole)
    checks.same_dtype(op, x=x, x1=x1)
    for name, each in rows.items():
        if each is not None:
            checks.shape(op, name, each, (x.shape[-1],), "[H], H the last dimension of x")
    for name, each in whole.items():
        if each is not None:
            checks.shape(op, name, each, tuple(x.shape), "the shape of x")
    if rowscale is not None:
        checks.shape(op, "rowscale", rowscale, tuple(x.shape[:-1]), "one for each row of x")
        if x1 is not None:
            raise ValueError(f"{op}: rowscale must be None where there is x1, got {list(rowscale.shape)}")
    if bias1 is not None and weight1 is None:
        raise ValueError(f"{op}: bias1 belongs to weight1, which is None")
