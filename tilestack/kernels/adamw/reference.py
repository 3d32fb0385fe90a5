"""adamw in plain torch: the definition, in the order of torch.optim.AdamW's operations."""

from __future__ import annotations

from tilestack.kernels.dispatch import Call


def refuses(call: Call) -> str | None:
    return None


def update(param, grad, exp_avg, exp_avg_sq, master, grad_scale, scalars, params) -> None:
    if grad_scale is not None and grad_scale.isnan():
        return
    wide = exp_avg.dtype
    decay, step_size, correction2_sqrt = params.scalars() if scalars is None else scalars
    g = grad.to(wide) if grad_scale is None else grad.to(wide) * grad_scale.to(wide)
    weights = param.to(wide) if master is None else master
    weights.mul_(decay)
    exp_avg.lerp_(g, 1 - params.beta1)
    exp_avg_sq.mul_(params.beta2).addcmul_(g, g, value=1 - params.beta2)
    denominator = (exp_avg_sq.sqrt() / correction2_sqrt).add_(params.eps)
    if scalars is None:
        weights.addcdiv_(exp_avg, denominator, value=-step_size)
    else:
        weights.sub_(step_size * exp_avg / denominator)
    param.copy_(weights)
