"""AdamW by our own kernel: what it keeps for a tensor, and as an optimizer of torch for DeepSpeed's flat tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tilestack.distributed.checkpoint import MOMENTS
from tilestack.distributed.config import OptimizerConfig
from tilestack.kernels import adamw
from tilestack.kernels.adamw.eight_bits import decode, encode, scales_of

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "8bit": torch.uint8}


def new_moments(parameter: torch.Tensor, kept_in: str) -> dict[str, torch.Tensor]:
    """Moments of zero for a parameter, as `kernels.adamw` takes them; with their scales where they are in 8 bits."""
    moments = {kind: torch.zeros_like(parameter, dtype=DTYPES[kept_in], requires_grad=False) for kind in MOMENTS}
    if kept_in == "8bit":
        scales = scales_of(parameter.numel())
        moments |= {f"{kind}_scale": torch.zeros(scales, device=parameter.device) for kind in MOMENTS}
    return moments


def readable(state: Mapping[str, torch.Tensor], decoded: bool = True) -> dict[str, torch.Tensor]:
    """The moments as numbers: those in 8 bits as a float32 copy in the host's memory, all others as they are.

    A copy on the device would be four times as large as what it is a copy of.

    decoded: without it the copies are on "meta": their shapes and types, at no cost.
    """

    def numbers(kind: str) -> torch.Tensor:
        if f"{kind}_scale" not in state:
            return state[kind]
        if not decoded:
            return torch.empty_like(state[kind], dtype=torch.float32, device="meta")
        return decode(state[kind].cpu(), state[f"{kind}_scale"].cpu(), signed=kind == "exp_avg")

    return {kind: numbers(kind) for kind in MOMENTS}


def take_up(state: Mapping[str, torch.Tensor], moments: Mapping[str, torch.Tensor]) -> None:
    """After what `readable` gave was written to: back into 8 bits. What `readable` gave unwritten changes no bit."""
    for kind in MOMENTS:
        if f"{kind}_scale" in state:
            codes, scales = torch.empty_like(moments[kind], dtype=torch.uint8), state[f"{kind}_scale"].cpu()
            encode(moments[kind], codes, scales, signed=kind == "exp_avg")
            state[kind].copy_(codes)
            state[f"{kind}_scale"].copy_(scales)


class AdamW(torch.optim.Optimizer):
    """`kernels.adamw` on every parameter that has a gradient. Which kernel runs is the dispatcher's choice.

    kept_in: optimizer.moments of the configuration. The state of a parameter: exp_avg, exp_avg_sq, in 8 bits their
    scales, "step" (how many updates), and "seed", which differs from parameter to parameter.
    """

    def __init__(self, groups: list[dict], optimizer: OptimizerConfig):
        # every step sets its learning rate; without ZeRO DeepSpeed makes an update before the first
        defaults = {"lr": 0.0, "betas": (optimizer.beta1, optimizer.beta2), "eps": optimizer.eps, "weight_decay": 0.0}
        super().__init__(groups, defaults)
        self.kept_in = optimizer.moments

    def start(self, parameter: torch.nn.Parameter) -> dict[str, Any]:
        """The state of a parameter, made if there is none yet."""
        state = self.state[parameter]
        if not state:
            seed = sum(bool(each) for each in self.state.values())
            state |= {"step": 0, "seed": seed, **new_moments(parameter, self.kept_in)}
        return state

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One update of all parameters that have a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.update(group, parameter, parameter.grad)

    def update(
        self,
        group: dict[str, Any],
        parameter: torch.Tensor,
        gradient: torch.Tensor,
        weights: torch.Tensor | None = None,
        grad_scale: torch.Tensor | None = None,
    ) -> None:
        """One update of one parameter of a group.

        weights: where the new value goes too, in the model's precision. grad_scale: multiplies the gradient; where it
            is NaN, nothing changes.
        """
        state = self.start(parameter)
        state["step"] += 1
        moments = {name: each for name, each in state.items() if isinstance(each, torch.Tensor)}
        together = weights is not None and weights.dtype != parameter.dtype  # written by the same kernel
        beta1, beta2 = group["betas"]
        adamw(
            weights if together else parameter,
            gradient,
            **moments,
            master=parameter if together else None,
            step=state["step"],
            lr=group["lr"],
            beta1=beta1,
            beta2=beta2,
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            grad_scale=grad_scale,
            seed=state["seed"],
        )
        if weights is not None and not together and weights.data_ptr() != parameter.data_ptr():
            weights.copy_(parameter)
