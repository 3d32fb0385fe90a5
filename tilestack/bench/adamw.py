"""An update of AdamW with every way of keeping its state, beside torch's fused AdamW.

Nothing is timed if the kernel fails a case of its grid on this device.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from tilestack.app.ceilings import ceilings
from tilestack.bench.results import FOLDER, Recorder, Row
from tilestack.bench.timing import measure
from tilestack.kernels import adamw
from tilestack.kernels.adamw.eight_bits import scales_of
from tilestack.testing import compare
from tilestack.testing.cases.adamw import CASES

PARAMETERS = 32 * 1536 * 2048
OPTIONS = {"step": 10, "lr": 1e-4, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
STATES = {  # moments, and whether bfloat16 weights have a float32 master
    "float32, master": (torch.float32, True),
    "bfloat16, master": (torch.bfloat16, True),
    "bfloat16, no master": (torch.bfloat16, False),
    "8bit, master": (torch.uint8, True),
    "8bit, no master": (torch.uint8, False),
}
Tensors = dict[str, torch.Tensor]


def tensors(n: int, moments: torch.dtype, master: bool, device: str = "cuda") -> Tensors:
    """A bfloat16 weight and gradient of n elements, and what AdamW keeps for them, in the middle of a training."""

    def random(scale: float) -> torch.Tensor:
        return torch.randn(n, device=device).mul_(scale)

    weights = random(0.02)
    made = {"param": weights.bfloat16(), "grad": random(1e-3).bfloat16()}
    if master:
        made["master"] = weights
    if moments != torch.uint8:
        return made | {"exp_avg": random(1e-3).to(moments), "exp_avg_sq": random(1e-3).square_().to(moments)}
    for name, scale in {"exp_avg": 1e-3, "exp_avg_sq": 1e-6}.items():
        made[name] = torch.randint(256, (n,), device=device, dtype=torch.uint8)
        made[f"{name}_scale"] = torch.rand(scales_of(n), device=device).mul_(scale)
    return made


def bytes_moved(made: Tensors) -> int:
    """Everything is read and written once, but the gradient is not written, and a weight with a master not read."""
    once = {"grad", "param"} if "master" in made else {"grad"}
    return sum(each.nbytes * (1 if name in once else 2) for name, each in made.items())


def check(device: torch.device) -> None:
    """Raise AssertionError if the kernel breaks the rule of testing.compare in a case of the grid; bf16 weights."""
    for case in CASES.cases:
        compare.check(CASES, case, "tilestack-triton", torch.bfloat16, device)


def _torch_fused(made: Tensors) -> Callable[[], None]:
    """The float32 master alone, with a float32 gradient: what torch does without the casts around it."""
    step, gradient = torch.full((), 10.0, device="cuda"), made["grad"].float()
    states = [made["master"]], [gradient], [made["exp_avg"]], [made["exp_avg_sq"]], [], [step]
    numbers = {name: OPTIONS[name] for name in ("lr", "beta1", "beta2", "weight_decay", "eps")}
    return lambda: torch._fused_adamw_(*states, **numbers, amsgrad=False, maximize=False)


def run(repeats: int, folder: Path = FOLDER) -> Path:
    """Time every state; the result file's path."""
    check(torch.device("cuda"))
    recorder = Recorder("adamw", ceilings(torch.device("cuda")), folder, lambda row: f"{row.case} {row.ms_median} ms")
    for state, (moments, master) in STATES.items():
        made = tensors(PARAMETERS, moments, master)
        recorder.add(_row(state, "tilestack-triton", lambda made=made: adamw(**made, **OPTIONS, seed=1),
                          bytes_moved(made), repeats))  # fmt: skip
    made = tensors(PARAMETERS, torch.float32, master=True)
    return recorder.add(
        _row("float32 weights and gradient", "torch-fused", _torch_fused(made), 28 * PARAMETERS, repeats)
    )


def _row(state: str, implementation: str, call: Callable[[], None], moved: int, repeats: int) -> Row:
    timing = measure(call, repeats)
    return Row(
        "adamw", {"state": state, "parameters": PARAMETERS, "bytes": moved}, implementation, "step",
        ms_median=timing.median, ms_min=timing.low, ms_max=timing.high, gbps=moved / timing.median / 1e6,
    )  # fmt: skip
