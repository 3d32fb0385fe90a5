"""Cases of adamw: what one step writes. tests/kernels/test_adamw.py follows many steps."""

from __future__ import annotations

import torch

from tilestack.kernels import adamw
from tilestack.kernels.adamw.eight_bits import decode, encode, scales_of
from tilestack.testing.compare import Case, OpCases

STEP = {"step": 3, "lr": 1e-2, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
SIGNED = {"exp_avg": True, "exp_avg_sq": False}  # the moments and their format in 8 bits


def _make(
    shape: tuple[int, ...],
    *,
    master: bool = False,
    grad_dtype: torch.dtype | None = None,
    grad_scale: float | None = None,
    transposed: bool = False,
    zero_state: bool = False,
    scalars: tuple[float, float, float, float] | None = None,
    moments: torch.dtype | None = None,
    spread: float = 1.0,
):
    def make(dtype, device, generator):
        def random(*size, to=torch.float32):
            return torch.randn(size, generator=generator).to(device, to)

        wide = torch.promote_types(dtype, torch.float32)
        weights = random(*shape, to=wide)
        grad = random(*reversed(shape)).permute(*reversed(range(len(shape)))) if transposed else random(*shape)
        sizes = torch.logspace(0, -spread, weights.numel(), device=device).view(shape) if spread > 1 else 1.0
        made = {
            "param": weights.to(dtype),
            "grad": (sizes * grad).to(grad_dtype or dtype),
            "exp_avg": (0 if zero_state else 0.1) * random(*shape, to=wide) * sizes,
            "exp_avg_sq": (0 if zero_state else 0.1) * random(*shape, to=wide).square() * sizes * sizes,
            "master": weights if master else None,
            "grad_scale": None if grad_scale is None else torch.tensor(grad_scale, device=device),
            "scalars": None if scalars is None else torch.tensor(scalars, device=device, dtype=wide),
        }
        return made | _narrowed(made, moments)

    return make


def _narrowed(made, moments):
    if moments != torch.uint8:
        return {} if moments is None else {name: made[name].to(moments) for name in ("exp_avg", "exp_avg_sq")}
    kept = {}
    for name, signed in SIGNED.items():
        kept[name] = torch.zeros_like(made[name], dtype=torch.uint8)
        kept[f"{name}_scale"] = made[name].new_zeros(scales_of(made[name].numel()))
        encode(made[name], kept[name], kept[f"{name}_scale"], signed=signed)
    return kept


def _call(tensors, arguments, implementation):
    """Moments in 8 bits are given back as what they stand for; the oracle keeps them in float64 throughout."""
    state = {name: None if tensor is None else tensor.clone() for name, tensor in tensors.items()}
    in_8_bits = state["exp_avg"].dtype == torch.uint8
    is_oracle = state["param"].dtype == torch.float64
    if in_8_bits and is_oracle:
        state |= {name: decode(state[name], state.pop(f"{name}_scale"), signed=each) for name, each in SIGNED.items()}
    adamw(**state, **arguments, implementation=implementation)
    if in_8_bits and not is_oracle:
        state |= {name: decode(state[name], state[f"{name}_scale"], signed=each) for name, each in SIGNED.items()}
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
            _make((3, 67), master=True, grad_scale=0.5, scalars=(0.99, 2e-2, 0.4, 7.0)),
            STEP | {"step": 1000, "lr": 7.0},
        ),
        Case("empty", "a parameter of no elements", _make((0, 4), master=True, grad_scale=0.5), STEP),
        Case(
            "bf16 moments", "moments are widened, and rounded to nearest", _make((8, 24), moments=torch.bfloat16), STEP
        ),
        Case(
            "bf16 moments by chance",
            "moments are rounded up or down, weights have a master",
            _make((3, 511), moments=torch.bfloat16, master=True, grad_scale=0.25),
            STEP | {"seed": 5},
        ),
        Case("8-bit moments", "codes and scales, to nearest", _make((8, 64), moments=torch.uint8), STEP),
        Case(
            "8-bit moments by chance",
            "the last group of 256 and the last program are not full",
            _make((3, 511), moments=torch.uint8, master=True, grad_scale=0.25),
            STEP | {"seed": 5},
        ),
        Case(
            "8-bit moments of all sizes",
            "within a group some are so small that they have no code",
            _make((1300,), moments=torch.uint8, spread=30.0),
            STEP | {"seed": 6},
        ),
        Case(
            "8-bit moments, first step",
            "groups of zeros, whose scale is 0",
            _make((300,), moments=torch.uint8, zero_state=True, grad_scale=0.5),
            STEP | {"step": 1, "seed": 0},
        ),
        Case(
            "8-bit moments, left out",
            "a scale of NaN changes neither codes nor scales",
            _make((300,), moments=torch.uint8, grad_scale=float("nan")),
            STEP | {"seed": 0},
        ),
        Case(
            "8-bit moments, scalars on the device",
            "the step that random numbers are drawn from is read there",
            _make((2, 300), moments=torch.uint8, scalars=(0.99, 2e-2, 0.4, 7.0)),
            STEP | {"seed": 1},
        ),
        Case("8-bit moments of nothing", "no elements, no scales", _make((0, 4), moments=torch.uint8), STEP),
        Case(
            "8-bit moments of a Qwen3-30B-A3B expert",
            "a real shape",
            _make((8, 1536, 2048), moments=torch.uint8),
            STEP | {"seed": 3},
            gpu_only=True,
        ),
        Case("Qwen3-30B-A3B expert", "a real shape", _make((8, 1536, 2048), master=True), STEP, gpu_only=True),
    ),
)
