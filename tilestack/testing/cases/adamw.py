"""Cases of adamw: what one step writes. tests/kernels/test_adamw.py follows many steps."""

from __future__ import annotations

import torch

from tilestack.kernels import adamw
from tilestack.testing.compare import Case, OpCases

STEP = {"step": 3, "lr": 1e-2, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}


def _make(
    shape: tuple[int, ...],
    *,
    master: bool = False,
    grad_dtype: torch.dtype | None = None,
    grad_scale: float | None = None,
    transposed: bool = False,
    zero_state: bool = False,
    scalars: tuple[float, float, float] | None = None,
):
    def make(dtype, device, generator):
        def random(*size, to=torch.float32):
            return torch.randn(size, generator=generator).to(device, to)

        wide = torch.promote_types(dtype, torch.float32)
        weights = random(*shape, to=wide)
        grad = random(*reversed(shape)).permute(*reversed(range(len(shape)))) if transposed else random(*shape)
        return {
            "param": weights.to(dtype),
            "grad": grad.to(grad_dtype or dtype),
            "exp_avg": (0 if zero_state else 0.1) * random(*shape, to=wide),
            "exp_avg_sq": (0 if zero_state else 0.1) * random(*shape, to=wide).square(),
            "master": weights if master else None,
            "grad_scale": None if grad_scale is None else torch.tensor(grad_scale, device=device),
            "scalars": None if scalars is None else torch.tensor(scalars, device=device, dtype=wide),
        }

    return make


def _call(tensors, arguments, implementation):
    state = {name: None if tensor is None else tensor.clone() for name, tensor in tensors.items()}
    adamw(**state, **arguments, implementation=implementation)
    return {name: state[name] for name in ("param", "exp_avg", "exp_avg_sq", "master") if state[name] is not None}


CASES = OpCases(
    op="adamw",
    call=_call,
    differentiable=(),
    cases=(
        Case("plain", "the common case", _make((8, 24)), STEP),
        Case("master", "param is written from the float32 weights", _make((8, 24), master=True), STEP),
        Case("clipped", "the gradient is scaled on the device", _make((8, 24), master=True, grad_scale=0.25), STEP),
        Case("left out", "a scale of NaN changes nothing", _make((8, 24), master=True, grad_scale=float("nan")), STEP),
        Case("float32 grad", "grad is wider than param", _make((8, 24), master=True, grad_dtype=torch.float32), STEP),
        Case("bf16 grad", "grad is narrower than param", _make((8, 24), grad_dtype=torch.bfloat16), STEP),
        Case("more than a block", "several programs, the last one masked", _make((3, 1511)), STEP),
        Case("one number", "fewer elements than a block", _make((1,)), STEP),
        Case("a scalar", "no dimensions", _make(()), STEP),
        Case("strided grad", "grad is laid out otherwise than param", _make((6, 10), transposed=True), STEP),
        Case(
            "first step",
            "zero moments: the bias correction is largest",
            _make((40,), zero_state=True),
            STEP | {"step": 1},
        ),
        Case("no decay", "weight_decay is 0", _make((40,)), STEP | {"weight_decay": 0.0}),
        Case(
            "scalars on the device",
            "they stand in the place of step, lr and weight_decay",
            _make((3, 67), master=True, grad_scale=0.5, scalars=(0.99, 2e-2, 0.4)),
            STEP | {"step": 1000, "lr": 7.0},
        ),
        Case("empty", "a parameter of no elements", _make((0, 4), master=True, grad_scale=0.5), STEP),
        Case("Qwen3-30B-A3B expert", "a real shape", _make((8, 1536, 2048), master=True), STEP, gpu_only=True),
    ),
)
