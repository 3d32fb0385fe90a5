"""adamw in plain torch: the definition, in the order of torch.optim.AdamW's operations."""

from __future__ import annotations

import torch

from tilestack.kernels.adamw.eight_bits import UNIT, decode, encode
from tilestack.kernels.dispatch import Call

MASK = 0xFFFFFFFF


def refuses(call: Call) -> str | None:
    return None


def update(
    param, grad, exp_avg, exp_avg_sq, master, grad_scale, scalars, exp_avg_scale, exp_avg_sq_scale, params
) -> None:
    if grad_scale is not None and grad_scale.isnan():
        return
    wide = torch.promote_types(param.dtype, torch.float32)
    decay, step_size, correction2_sqrt, step = params.scalars() if scalars is None else scalars
    g = grad.to(wide) if grad_scale is None else grad.to(wide) * grad_scale.to(wide)
    weights = param.to(wide) if master is None else master
    first = _moment(exp_avg, exp_avg_scale, wide, signed=True)
    second = _moment(exp_avg_sq, exp_avg_sq_scale, wide, signed=False)
    weights.mul_(decay)
    first.lerp_(g, 1 - params.beta1)
    second.mul_(params.beta2).addcmul_(g, g, value=1 - params.beta2)
    denominator = (second.sqrt() / correction2_sqrt).add_(params.eps)
    if scalars is None:
        weights.addcdiv_(first, denominator, value=-step_size)
    else:
        weights.sub_(step_size * first / denominator)
    is_narrow = exp_avg.dtype.itemsize < 4 or (master is None and param.dtype == torch.bfloat16)
    draws = (None, None, None)
    if params.seed >= 0 and is_narrow:
        draws = draw(param.numel(), int(step), params.seed, param.device)
    _keep(first, exp_avg, exp_avg_scale, draws[0], signed=True)
    _keep(second, exp_avg_sq, exp_avg_sq_scale, draws[1], signed=False)
    if master is None and param.dtype == torch.bfloat16 and draws[2] is not None:
        param.copy_(to_bfloat16(weights, draws[2]))
    else:
        param.copy_(weights)


def draw(n: int, step: int, seed: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """int64 [n] each: random numbers below 2^20, 2^20 and 2^16, of independent bits."""
    key = _mix(torch.tensor((seed * 0x9E3779B1 + step) & MASK, device=device))
    one = _mix(torch.arange(n, device=device) & MASK ^ key)
    two = _mix((one + key) & MASK)
    return one >> 12, two >> 12, (one & 0xFFF) << 4 | (two & 0xF)


def to_bfloat16(x: torch.Tensor, random: torch.Tensor) -> torch.Tensor:
    """float32 rounded up or down to bfloat16 by random numbers below 2^16; NaN stays."""
    bits = x.float().view(torch.int32).long()
    rounded = ((bits + random.view(x.shape)) & 0xFFFF0000).to(torch.int32).view(torch.float32)
    return torch.where(x.isnan(), x, rounded).bfloat16()


def _mix(x: torch.Tensor) -> torch.Tensor:
    """The hash "lowbias32" (Wellons, 2018), on 32 bits in int64."""
    x = x ^ x >> 16
    x = x * 0x7FEB352D & MASK
    x = x ^ x >> 15
    x = x * 0x846CA68B & MASK
    return x ^ x >> 16


def _moment(kept: torch.Tensor, scale: torch.Tensor | None, wide: torch.dtype, signed: bool) -> torch.Tensor:
    """The moment in `wide`: the tensor itself where it is kept so."""
    return kept.to(wide) if scale is None else decode(kept, scale, signed=signed).to(wide)


def _keep(moment: torch.Tensor, kept: torch.Tensor, scale: torch.Tensor | None, random, signed: bool) -> None:
    if scale is not None:
        encode(moment, kept, scale, signed=signed, random=random)
    elif kept.dtype == torch.bfloat16:
        kept.copy_(moment if random is None else to_bfloat16(moment, random * 65536 // UNIT))
