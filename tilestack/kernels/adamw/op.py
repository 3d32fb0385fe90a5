"""One step of AdamW on one tensor, in place: the contract.

    g = grad * grad_scale
    exp_avg    = beta1 * exp_avg + (1 - beta1) * g
    exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * g^2
    w = (1 - lr * weight_decay) * w
    w = w - lr / (1 - beta1^step) * exp_avg / (sqrt(exp_avg_sq / (1 - beta2^step)) + eps)

and nothing at all if grad_scale is NaN. w is the float32 master where there is one, else param. Source: Loshchilov and
Hutter, "Decoupled Weight Decay Regularization" (2019), algorithm 2, with the learning rate multiplied into the decay as
torch.optim.AdamW does it. Float32 inside.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tilestack.kernels import checks
from tilestack.kernels.dispatch import Op, portable, reference
from tilestack.kernels.registration import InPlaceContract


@dataclass(frozen=True)
class AdamWParams:
    step: int
    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float

    def scalars(self) -> tuple[float, float, float]:
        """What step, lr and weight_decay come to, in double precision on the host: the factor of the weights, the size
        of the step, and the root of the second moment's bias correction."""
        correction1, correction2 = 1 - self.beta1**self.step, 1 - self.beta2**self.step
        return 1 - self.lr * self.weight_decay, self.lr / correction1, correction2**0.5


CONTRACT = InPlaceContract(
    "adamw",
    ("param", "grad", "exp_avg", "exp_avg_sq", "master?", "grad_scale?", "scalars?"),
    ("param", "exp_avg", "exp_avg_sq", "master"),
    AdamWParams,
)
OP = Op(CONTRACT, (portable("adamw"), reference("adamw")))


@torch.no_grad()
def adamw(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    *,
    master: torch.Tensor | None = None,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    grad_scale: torch.Tensor | None = None,
    scalars: torch.Tensor | None = None,
    implementation: str | None = None,
) -> None:
    """Update param, exp_avg, exp_avg_sq and master in place. The same input gives the same bits.

    param: any shape, floating point. With a master it is written only: the new master, rounded.
    grad: the shape of param, any floating dtype.
    exp_avg, exp_avg_sq: the shape of param, float32 (float64 where param is float64); zeros before the first step.
    master: like exp_avg, the weights in full precision; None where param itself is the weights.
    step: the number of this step, from 1.
    grad_scale: one number on param's device, float32, that the gradient is multiplied by (clipping without a
        synchronisation); None is 1. The bits are those of a step with the product, rounded to float32. Where it is NaN,
        nothing is changed: so a step whose gradient is not finite is left out, and the host need not know.
    scalars: [3] on param's device, of exp_avg's dtype: what `AdamWParams.scalars` makes of step, lr and weight_decay,
        which are then not looked at. For a captured CUDA graph, whose numbers on the host are fixed.
    implementation: "tilestack-triton" or "reference"; None chooses.

    Raises ValueError for wrong shapes, dtypes, devices or numbers; then nothing was changed.
    """
    _check_tensors(param, grad, exp_avg, exp_avg_sq, master, grad_scale)
    if scalars is not None:
        checks.shape("adamw", "scalars", scalars, (3,), "[3]")
        checks.dtype("adamw", "scalars", scalars, exp_avg.dtype)
        checks.same_device("adamw", param=param, scalars=scalars)
    params = AdamWParams(step, lr, beta1, beta2, eps, weight_decay)
    _check_numbers(params)
    OP((param, grad, exp_avg, exp_avg_sq, master, grad_scale, scalars), params, implementation)


def _check_tensors(param, grad, exp_avg, exp_avg_sq, master, grad_scale) -> None:
    checks.floating("adamw", param=param, grad=grad, grad_scale=grad_scale)
    checks.same_device(
        "adamw", param=param, grad=grad, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq, master=master, grad_scale=grad_scale
    )
    wide = torch.promote_types(param.dtype, torch.float32)
    for name, state in {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "master": master}.items():
        if state is not None:
            checks.shape("adamw", name, state, tuple(param.shape), "the shape of param")
            checks.dtype("adamw", name, state, wide)
    checks.shape("adamw", "grad", grad, tuple(param.shape), "the shape of param")
    if grad_scale is not None and grad_scale.numel() != 1:
        raise ValueError(f"adamw: grad_scale must be one number, got {list(grad_scale.shape)}")


def _check_numbers(params: AdamWParams) -> None:
    checks.at_least("adamw", "step", params.step, 1)
    for name in ("lr", "eps", "weight_decay"):
        checks.at_least("adamw", name, getattr(params, name), 0)
    for name in ("beta1", "beta2"):
        if not 0 <= getattr(params, name) < 1:
            raise ValueError(f"adamw: {name} must be at least 0 and less than 1, got {getattr(params, name)}")
