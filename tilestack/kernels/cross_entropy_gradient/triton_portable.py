"""cross_entropy_gradient in Triton: a program for each block of columns of a row.

Each element is read and written once, by the same thread, so that in place is like out of place. The GPU's exponential
is wrong by four units of float32, which a gradient in float32 would show: it gets a polynomial.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tilestack.kernels import launch
from tilestack.kernels.cross_entropy.configs import BLOCK_V, NUM_WARPS
from tilestack.kernels.dispatch import Call
from tilestack.kernels.triton_numerics import LOG2E


def refuses(call: Call) -> str | None:
    return "has no float64 path" if call.dtype("dlogits") == torch.float64 else None


LN2_HIGH = tl.constexpr(0.693145751953125)  # few enough bits that a product with a small integer is exact
LN2_LOW = tl.constexpr(1.4286068203094173e-06)


@triton.jit
def _exponential(x, PRECISE: tl.constexpr):
    """e to the x, x at most a little over 0.

    Precisely: x = n ln 2 + r with |r| <= ln 2 / 2, and the series of e to the r up to its seventh power, behind which
    5e-9 is left.
    """
    if not PRECISE:
        return tl.exp(x)
    x = tl.maximum(x, -87.0)  # e to the -87 is the smallest that is no subnormal number
    n = tl.floor(x * LOG2E + 0.5)
    r = (x - n * LN2_HIGH) - n * LN2_LOW
    tail = 1.0 / 24 + r * (1.0 / 120 + r * (1.0 / 720 + r * (1.0 / 5040)))
    return (1.0 + (r + r * r * (0.5 + r * (1.0 / 6 + r * tail)))) * tl.exp2(n)


@triton.jit(do_not_specialize=["ignore_index", "class_start", "total_classes"])
def cross_entropy_bwd_kernel(
    dlogits_ptr, logits_ptr, labels_ptr, lse_ptr, dlosses_ptr, stride_dlogits, stride_logits, stride_dlosses,
    label_smoothing, logit_scale, lse_square_scale, ignore_index, class_start, total_classes,
    V, BLOCK_V: tl.constexpr, PRECISE: tl.constexpr,
):  # fmt: skip
    row = tl.cast(tl.program_id(0), tl.int64)
    offs = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    mask = offs < V
    label = tl.load(labels_ptr + row)
    gradient = tl.zeros([BLOCK_V], tl.float32)
    upstream = tl.load(dlosses_ptr + row * stride_dlosses).to(tl.float32) * logit_scale
    if (label != ignore_index) & (upstream != 0.0):
        lse = tl.load(lse_ptr + row)
        z = tl.load(logits_ptr + row * stride_logits + offs, mask=mask, other=0.0).to(tl.float32) * logit_scale
        probabilities = _exponential(z - lse, PRECISE) * (1.0 + 2.0 * lse_square_scale * lse)
        wanted = tl.where(offs + class_start == label, 1.0 - label_smoothing, 0.0) + label_smoothing / total_classes
        gradient = upstream * (probabilities - wanted)
    tl.store(dlogits_ptr + row * stride_dlogits + offs, gradient.to(dlogits_ptr.dtype.element_ty), mask=mask)


def update(dlogits, logits, labels, lse, dlosses, params) -> None:
    logits = dlogits if logits is None else logits if logits.stride(-1) == 1 else logits.contiguous()
    rows, classes = dlogits.shape
    if rows == 0:
        return
    block = min(BLOCK_V, launch.next_power_of_2(classes))
    with launch.on_device(dlogits):
        launch.run(
            cross_entropy_bwd_kernel, (rows, launch.cdiv(classes, block)),
            dlogits, logits, labels.contiguous(), lse.contiguous(), dlosses,
            dlogits.stride(0), logits.stride(0), dlosses.stride(0), params.label_smoothing, params.logit_scale,
            params.lse_square_scale, params.ignore_index, params.class_start, params.total_classes, classes,
            BLOCK_V=block, PRECISE=dlogits.dtype == torch.float32, num_warps=NUM_WARPS,
        )  # fmt: skip
