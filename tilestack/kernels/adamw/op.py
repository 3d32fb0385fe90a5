"""One step of AdamW on one tensor, in place: the contract.

    g = grad * grad_scale
    exp_avg    = beta1 * exp_avg + (1 - beta1) * g
    exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * g^2
    w = (1 - lr * weight_decay) * w
    w = w - lr / (1 - beta1^step) * exp_avg / (sqrt(exp_avg_sq / (1 - beta2^step)) + eps)

and nothing at all if grad_scale is NaN. w is the float32 master where there is one, else param. Source: Loshchilov and
Hutter, "Decoupled Weight Decay Regularization" (2019), algorithm 2, with the learning rate multiplied into the decay as
torch.optim.AdamW does it. Float32 inside, whatever the moments are kept in.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tilestack.kernels import checks
from tilestack.kernels.adamw.eight_bits import scales_of
from tilestack.kernels.dispatch import Op, portable, reference
from tilestack.kernels.registration import InPlaceContract

TO_NEAREST = -1  # as AdamWParams.seed


@dataclass(frozen=True)
class AdamWParams:
    step: int
    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    seed: int = TO_NEAREST

    def scalars(self) -> tuple[float, float, float, float]:
        """What step, lr and weight_decay come to, in double precision on the host: the factor of the weights, the size
        of the step, the root of the second moment's bias correction, and the step itself, which random numbers are
        drawn from."""
        correction1, correction2 = 1 - self.beta1**self.step, 1 - self.beta2**self.step
        return 1 - self.lr * self.weight_decay, self.lr / correction1, correction2**0.5, float(self.step)


CONTRACT = InPlaceContract(
    "adamw",
    ("param", "grad", "exp_avg", "exp_avg_sq", "master?", "grad_scale?", "scalars?", "exp_avg_scale?",
     "exp_avg_sq_scale?"),
    ("param", "exp_avg", "exp_avg_sq", "master", "exp_avg_scale", "exp_avg_sq_scale"),
    AdamWParams,
)  # fmt: skip
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
    exp_avg_scale: torch.Tensor | None = None,
    exp_avg_sq_scale: torch.Tensor | None = None,
    seed: int | None = None,
    implementation: str | None = None,
) -> None:
    """Update param, the moments and master in place. The same input gives the same bits.

    param: any shape, floating point. With a master it is written only: the new master, rounded.
    grad: the shape of param, any floating dtype.
    exp_avg, exp_avg_sq: the shape of param, both float32 (float64 where param is float64), both bfloat16, or both
        uint8: 8 bits an element (`eight_bits.py`) with the scales below. All zeros before the first step.
    exp_avg_scale, exp_avg_sq_scale: float32 [ceil(n / 256)] of n elements: the scales of uint8 moments; else None.
    master: the shape of param, float32, the weights in full precision; None where param itself is the weights.
    step: the number of this step, from 1.
    grad_scale: one number on param's device, float32, that the gradient is multiplied by (clipping without a
        synchronisation); None is 1. The bits are those of a step with the product, rounded to float32. Where it is NaN,
        nothing is changed: so a step whose gradient is not finite is left out, and the host need not know.
    scalars: [4] on param's device, float32 (float64 where param is float64): what `AdamWParams.scalars` makes of step,
        lr and weight_decay, which are then not looked at. For a captured CUDA graph, whose numbers on the host are
        fixed.
    seed: of the random numbers, from 0, with which moments of 8 or 16 bits, and a bfloat16 param without a master, are
        rounded: up or down by chance, so that on average nothing is lost. Drawn from seed, step and the place of the
        element alone. None rounds to nearest, which loses what is smaller than half a unit.
    implementation: "tilestack-triton" or "reference"; None chooses.

    Raises ValueError for wrong shapes, dtypes, devices or numbers; then nothing was changed.
    """
    _check_tensors(param, grad, master, grad_scale, scalars)
    _check_moments(param, exp_avg, exp_avg_sq, exp_avg_scale, exp_avg_sq_scale)
    if seed is not None:
        checks.at_least("adamw", "seed", seed, 0)
    params = AdamWParams(step, lr, beta1, beta2, eps, weight_decay, TO_NEAREST if seed is None else seed)
    _check_numbers(params)
    OP(
        (param, grad, exp_avg, exp_avg_sq, master, grad_scale, scalars, exp_avg_scale, exp_avg_sq_scale),
        params,
        implementation,
    )


def _check_tensors(param, grad, master, grad_scale, scalars) -> None:
    checks.floating("adamw", param=param, grad=grad, grad_scale=grad_scale)
    checks.same_device("adamw", param=param, grad=grad, master=master, grad_scale=grad_scale, scalars=scalars)
    wide = torch.promote_types(param.dtype, torch.float32)
    checks.shape("adamw", "grad", grad, tuple(param.shape), "the shape of param")
    if master is not None:
        checks.shape("adamw", "master", master, tuple(param.shape), "the shape of param")
        checks.dtype("adamw", "master", master, wide)
    if grad_scale is not None and grad_scale.numel() != 1:
        raise ValueError(f"adamw: grad_scale must be one number, got {list(grad_scale.shape)}")
    if scalars is not None:
        checks.shape("adamw", "scalars", scalars, (4,), "[4]")
        checks.dtype("adamw", "scalars", scalars, wide)


def _check_moments(param, exp_avg, exp_avg_sq, exp_avg_scale, exp_avg_sq_scale) -> None:
    scales = {"exp_avg_scale": exp_avg_scale, "exp_avg_sq_scale": exp_avg_sq_scale}
    checks.same_device("adamw", param=param, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq, **scales)
    narrow = {torch.bfloat16, torch.uint8} if param.dtype != torch.float64 else set()
    kept = exp_avg.dtype if exp_avg.dtype in narrow else torch.promote_types(param.dtype, torch.float32)
    for name, state in {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}.items():
        checks.shape("adamw", name, state, tuple(param.shape), "the shape of param")
        checks.dtype("adamw", name, state, kept)
    for name, scale in scales.items():
        if (scale is not None) != (kept == torch.uint8):
            raise ValueError(
                f"adamw: {name} belongs to moments in torch.uint8 and to no others, the moments are {kept}"
            )
        if scale is not None:
            checks.shape("adamw", name, scale, (scales_of(param.numel()),), "one of each 256 elements")
            checks.dtype("adamw", name, scale, torch.float32)


def _check_numbers(params: AdamWParams) -> None:
    checks.at_least("adamw", "step", params.step, 1)
    for name in ("lr", "eps", "weight_decay"):
        checks.at_least("adamw", name, getattr(params, name), 0)
    for name in ("beta1", "beta2"):
        if not 0 <= getattr(params, name) < 1:
            raise ValueError(f"adamw: {name} must be at least 0 and less than 1, got {getattr(params, name)}")
