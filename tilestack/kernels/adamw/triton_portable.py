"""adamw in Triton: one pass over one tensor, every element read once and written once.

Square root and quotient are rounded correctly: the kernel waits for memory, and the result follows torch's closely.
Multiply-adds are written out, because which of two products a compiler fuses with a sum may differ from one variant of
the kernel to the next, and with it the last bit.

Moments in 8 bits have a kernel of their own, in which a program's elements lie in rows of 256 that share a scale: the
largest of a row is found within a warp. Random numbers are a hash of the element's place, so none are read.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tilestack.kernels import launch
from tilestack.kernels.adamw import eight_bits
from tilestack.kernels.adamw.configs import BLOCK, NUM_WARPS
from tilestack.kernels.dispatch import Call

UNIT, GROUP = tl.constexpr(eight_bits.UNIT), tl.constexpr(eight_bits.GROUP)
FIRST_ZERO, SECOND_ZERO = tl.constexpr(eight_bits.FIRST_ZERO), tl.constexpr(eight_bits.SECOND_ZERO)
LEAST = tl.constexpr(eight_bits.LEAST)
SMALLEST_SCALE = tl.constexpr(eight_bits.SMALLEST_SCALE)


def refuses(call: Call) -> str | None:
    if call.dtype("param") == torch.float64:
        return "has no float64 path"
    for name in ("param", "exp_avg", "exp_avg_sq", "master"):
        spec = call.tensors[name]
        if spec is not None and not spec.is_contiguous:
            return f"updates contiguous tensors, {name} has shape {list(spec.shape)} and strides {list(spec.stride)}"
    return None


@triton.jit
def _mix(x):
    """The hash "lowbias32" (Wellons, 2018)."""
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _draw(offs, step, seed):
    """Two words of 32 random bits for each element."""
    key = _mix(tl.cast(seed, tl.uint32) * 0x9E3779B1 + tl.cast(step, tl.uint32))
    one = _mix(tl.cast(offs, tl.uint32) ^ key)
    return one, _mix(one + key)


@triton.jit
def _to_bfloat16(x, random):
    """x rounded up or down by random numbers below 2^16; NaN stays (a carry would make it a zero)."""
    bits = (tl.cast(x, tl.uint32, bitcast=True) + random) & 0xFFFF0000
    return tl.where(x == x, tl.cast(bits, tl.float32, bitcast=True), x).to(tl.bfloat16)


@triton.jit
def _narrowed(x, element: tl.constexpr, random, STOCHASTIC: tl.constexpr):
    if STOCHASTIC and element == tl.bfloat16:
        return _to_bfloat16(x, random)
    return x.to(element)


@triton.jit
def _store_weights(param_ptr, master_ptr, offs, weights, one, two, mask, STOCHASTIC: tl.constexpr):
    if master_ptr is None:  # the bits of the two words that the moments have not used
        random = ((one & 0xFFF) << 4) | (two & 0xF)
        tl.store(param_ptr + offs, _narrowed(weights, param_ptr.dtype.element_ty, random, STOCHASTIC), mask=mask)
    else:
        tl.store(param_ptr + offs, weights.to(param_ptr.dtype.element_ty), mask=mask)
        tl.store(master_ptr + offs, weights, mask=mask)


@triton.jit
def _updated(
    grad, exp_avg, exp_avg_sq, weights, one_minus_beta1, beta2, one_minus_beta2, decay, step_size, correction2_sqrt, eps
):
    exp_avg = tl.fma(one_minus_beta1, grad - exp_avg, exp_avg)
    exp_avg_sq = tl.fma(beta2, exp_avg_sq, one_minus_beta2 * grad * grad)
    denominator = tl.div_rn(tl.sqrt_rn(exp_avg_sq), correction2_sqrt) + eps
    return exp_avg, exp_avg_sq, tl.fma(decay, weights, -step_size * tl.div_rn(exp_avg, denominator))


@triton.jit(do_not_specialize=["step", "seed"])
def adamw_kernel(
    param_ptr, grad_ptr, exp_avg_ptr, exp_avg_sq_ptr, master_ptr, grad_scale_ptr, scalars_ptr, n_elements,
    one_minus_beta1, beta2, one_minus_beta2, decay, step_size, correction2_sqrt, eps, step, seed,
    STOCHASTIC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    offs = tl.cast(tl.program_id(0), tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < n_elements
    grad = tl.load(grad_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    exp_avg = tl.load(exp_avg_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    exp_avg_sq = tl.load(exp_avg_sq_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    weights_ptr = param_ptr if master_ptr is None else master_ptr
    weights = tl.load(weights_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    if scalars_ptr is not None:
        decay, step_size, correction2_sqrt = tl.load(scalars_ptr), tl.load(scalars_ptr + 1), tl.load(scalars_ptr + 2)
        step = tl.load(scalars_ptr + 3).to(tl.int32)
    if grad_scale_ptr is not None:
        grad_scale = tl.full([BLOCK], tl.load(grad_scale_ptr).to(tl.float32), tl.float32)
        grad = tl.fma(grad, grad_scale, 0.0)  # the product, rounded: not part of a later multiply-add
        mask &= grad_scale == grad_scale  # NaN: the step is left out; masking the stores alone keeps the loads early

    exp_avg, exp_avg_sq, weights = _updated(
        grad, exp_avg, exp_avg_sq, weights, one_minus_beta1, beta2, one_minus_beta2, decay, step_size,
        correction2_sqrt, eps,
    )  # fmt: skip

    one, two = offs, offs
    if STOCHASTIC:
        one, two = _draw(offs, step, seed)
    tl.store(exp_avg_ptr + offs, _narrowed(exp_avg, exp_avg_ptr.dtype.element_ty, one >> 16, STOCHASTIC), mask=mask)
    second = _narrowed(exp_avg_sq, exp_avg_sq_ptr.dtype.element_ty, two >> 16, STOCHASTIC)
    tl.store(exp_avg_sq_ptr + offs, second, mask=mask)
    _store_weights(param_ptr, master_ptr, offs, weights, one, two, mask, STOCHASTIC)


@triton.jit
def _share(codes, ZERO: tl.constexpr):
    return tl.where(codes == 0, 0.0, tl.cast((codes + ZERO) * UNIT, tl.float32, bitcast=True))


@triton.jit
def _largest(magnitude):
    """The largest of each row (0 if its inverse would not be finite), and every element's share of it."""
    largest = tl.max(magnitude, axis=1)
    largest = tl.where(largest >= SMALLEST_SCALE, largest, 0.0)
    inverse = 1.0 / tl.where(largest > 0, largest, 1.0)
    return largest, tl.minimum(magnitude * inverse[:, None], 1.0)


@triton.jit(do_not_specialize=["step", "seed"])
def adamw_8bit_kernel(
    param_ptr, grad_ptr, exp_avg_ptr, exp_avg_sq_ptr, master_ptr, grad_scale_ptr, scalars_ptr, exp_avg_scale_ptr,
    exp_avg_sq_scale_ptr, n_elements, one_minus_beta1, beta2, one_minus_beta2, decay, step_size, correction2_sqrt, eps,
    step, seed, STOCHASTIC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    ROWS: tl.constexpr = BLOCK // GROUP
    row = tl.cast(tl.program_id(0), tl.int64) * ROWS + tl.arange(0, ROWS)
    offs = row[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    mask, row_mask = offs < n_elements, row * GROUP < n_elements
    grad = tl.load(grad_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    first = tl.load(exp_avg_ptr + offs, mask=mask, other=0).to(tl.int32)
    second = tl.load(exp_avg_sq_ptr + offs, mask=mask, other=0).to(tl.int32)
    first_scale = tl.load(exp_avg_scale_ptr + row, mask=row_mask, other=0.0)
    second_scale = tl.load(exp_avg_sq_scale_ptr + row, mask=row_mask, other=0.0)
    weights_ptr = param_ptr if master_ptr is None else master_ptr
    weights = tl.load(weights_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    if scalars_ptr is not None:
        decay, step_size, correction2_sqrt = tl.load(scalars_ptr), tl.load(scalars_ptr + 1), tl.load(scalars_ptr + 2)
        step = tl.load(scalars_ptr + 3).to(tl.int32)
    if grad_scale_ptr is not None:
        grad_scale = tl.load(grad_scale_ptr).to(tl.float32)
        grad = tl.fma(grad, tl.full([ROWS, GROUP], grad_scale, tl.float32), 0.0)
        mask &= tl.full([ROWS, GROUP], grad_scale, tl.float32) == grad_scale
        row_mask &= tl.full([ROWS], grad_scale, tl.float32) == grad_scale

    magnitude = _share(first & 127, FIRST_ZERO) * first_scale[:, None]
    exp_avg = tl.where(first > 127, -magnitude, magnitude)
    exp_avg_sq = _share(second, SECOND_ZERO) * second_scale[:, None]
    exp_avg, exp_avg_sq, weights = _updated(
        grad, exp_avg, exp_avg_sq, weights, one_minus_beta1, beta2, one_minus_beta2, decay, step_size,
        correction2_sqrt, eps,
    )  # fmt: skip

    one = tl.zeros([ROWS, GROUP], tl.uint32)
    two = one
    added, added_too = UNIT // 2, UNIT // 2
    if STOCHASTIC:
        one, two = _draw(offs, step, seed)
        added, added_too = (one >> 12).to(tl.int32), (two >> 12).to(tl.int32)
    first_scale, share = _largest(tl.abs(exp_avg))
    codes = (tl.cast(share, tl.int32, bitcast=True) + added) // UNIT - FIRST_ZERO
    low = (share * (1.0 / LEAST) + added * (1.0 / UNIT)).to(tl.int32)
    codes = tl.where(share < LEAST, low, codes) | tl.where(exp_avg < 0, 128, 0)
    tl.store(exp_avg_ptr + offs, codes.to(tl.uint8), mask=mask)
    tl.store(exp_avg_scale_ptr + row, first_scale, mask=row_mask)

    second_scale, share = _largest(exp_avg_sq)
    codes = (tl.cast(share, tl.int32, bitcast=True) + added_too) // UNIT - SECOND_ZERO
    codes = tl.where(share > 0, tl.maximum(codes, 1), 0)
    tl.store(exp_avg_sq_ptr + offs, codes.to(tl.uint8), mask=mask)
    tl.store(exp_avg_sq_scale_ptr + row, second_scale, mask=row_mask)

    _store_weights(param_ptr, master_ptr, offs, weights, one, two, mask, STOCHASTIC)


def update(
    param, grad, exp_avg, exp_avg_sq, master, grad_scale, scalars, exp_avg_scale, exp_avg_sq_scale, params
) -> None:
    n_elements = param.numel()
    if n_elements == 0:
        return
    decay, step_size, correction2_sqrt, _ = params.scalars()
    in_8_bits = exp_avg_scale is not None
    kernel = adamw_8bit_kernel if in_8_bits else adamw_kernel
    scales = (exp_avg_scale, exp_avg_sq_scale) if in_8_bits else ()
    with launch.on_device(param):
        launch.run(
            kernel, (launch.cdiv(n_elements, BLOCK),),
            param, grad.contiguous(), exp_avg, exp_avg_sq, master, grad_scale,
            None if scalars is None else scalars.contiguous(), *scales, n_elements, 1 - params.beta1, params.beta2,
            1 - params.beta2, decay, step_size, correction2_sqrt, params.eps, params.step, params.seed,
            STOCHASTIC=params.seed >= 0, BLOCK=BLOCK, num_warps=NUM_WARPS,
        )  # fmt: skip
