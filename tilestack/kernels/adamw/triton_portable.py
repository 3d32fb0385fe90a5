"""adamw in Triton: one pass over one tensor, every element read once and written once.

Square root and quotient are rounded correctly: the kernel waits for memory, and the result follows torch's closely.
Multiply-adds are written out, because which of two products a compiler fuses with a sum may differ from one variant of
the kernel to the next, and with it the last bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tilestack.kernels import launch
from tilestack.kernels.adamw.configs import BLOCK, NUM_WARPS
from tilestack.kernels.dispatch import Call


def refuses(call: Call) -> str | None:
    if call.dtype("param") == torch.float64:
        return "has no float64 path"
    for name in ("param", "exp_avg", "exp_avg_sq", "master"):
        spec = call.tensors[name]
        if spec is not None and not spec.is_contiguous:
            return f"updates contiguous tensors, {name} has shape {list(spec.shape)} and strides {list(spec.stride)}"
    return None


@triton.jit
def adamw_kernel(
    param_ptr, grad_ptr, exp_avg_ptr, exp_avg_sq_ptr, master_ptr, grad_scale_ptr, scalars_ptr, n_elements,
    one_minus_beta1, beta2, one_minus_beta2, decay, step_size, correction2_sqrt, eps, BLOCK: tl.constexpr,
):  # fmt: skip
    offs = tl.cast(tl.program_id(0), tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < n_elements
    grad = tl.load(grad_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    exp_avg = tl.load(exp_avg_ptr + offs, mask=mask, other=0.0)
    exp_avg_sq = tl.load(exp_avg_sq_ptr + offs, mask=mask, other=0.0)
    weights_ptr = param_ptr if master_ptr is None else master_ptr
    weights = tl.load(weights_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    if scalars_ptr is not None:
        decay, step_size, correction2_sqrt = tl.load(scalars_ptr), tl.load(scalars_ptr + 1), tl.load(scalars_ptr + 2)
    if grad_scale_ptr is not None:
        grad_scale = tl.full([BLOCK], tl.load(grad_scale_ptr).to(tl.float32), tl.float32)
        grad = tl.fma(grad, grad_scale, 0.0)  # the product, rounded: not part of a later multiply-add
        mask &= grad_scale == grad_scale  # NaN: the step is left out; masking the stores alone keeps the loads early

    exp_avg = tl.fma(one_minus_beta1, grad - exp_avg, exp_avg)
    exp_avg_sq = tl.fma(beta2, exp_avg_sq, one_minus_beta2 * grad * grad)
    denominator = tl.div_rn(tl.sqrt_rn(exp_avg_sq), correction2_sqrt) + eps
    weights = tl.fma(decay, weights, -step_size * tl.div_rn(exp_avg, denominator))

    tl.store(exp_avg_ptr + offs, exp_avg, mask=mask)
    tl.store(exp_avg_sq_ptr + offs, exp_avg_sq, mask=mask)
    tl.store(param_ptr + offs, weights.to(param_ptr.dtype.element_ty), mask=mask)
    if master_ptr is not None:
        tl.store(master_ptr + offs, weights, mask=mask)


def update(param, grad, exp_avg, exp_avg_sq, master, grad_scale, scalars, params) -> None:
    n_elements = param.numel()
    if n_elements == 0:
        return
    decay, step_size, correction2_sqrt = params.scalars()
    with launch.on_device(param):
        adamw_kernel[(launch.cdiv(n_elements, BLOCK),)](
            param, grad.contiguous(), exp_avg, exp_avg_sq, master, grad_scale,
            None if scalars is None else scalars.contiguous(), n_elements, 1 - params.beta1, params.beta2,
            1 - params.beta2, decay, step_size, correction2_sqrt, params.eps, BLOCK=BLOCK, num_warps=NUM_WARPS,
        )  # fmt: skip
