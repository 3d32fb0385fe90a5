"""The rule that decides whether an implementation is right.

The oracle is the reference in float64 on the CPU. The honest competitor is the reference in the dtype under test, on
the same device ("eager"). An implementation passes if, for every output and every gradient,

    error(implementation, oracle) <= 2 * error(eager, oracle) + rounding

both for the largest error and for the root mean square. `rounding` is what computing the answer in float32 and storing
it may cost even where eager was lucky: of the largest value one unit in the last place; in the root mean square, of
every value half a unit and one unit of float32. It is the second that sees a wrong scale of 1% in bf16, whose unit is
0.8%. Of a single number (a loss) there is no average, so only the largest error counts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Case:
    """One input of an op.

    name: short, a sentence's worth, shown in the test's name.
    why: what goes wrong without this case.
    make: (dtype, device, generator) -> tensors by argument name, some of which may be integers or None. Random numbers
        are drawn on the CPU from `generator`, so every device sees the same ones.
    arguments: the other keyword arguments of the op's public function.
    gpu_only: too large for the interpreter.
    """

    name: str
    why: str
    make: Callable[[torch.dtype, torch.device, torch.Generator], Tensors]
    arguments: dict = field(default_factory=dict)
    gpu_only: bool = False


@dataclass(frozen=True)
class OpCases:
    """An op under test.

    op: the public function's name in tilestack.kernels.
    call: (tensors, arguments, implementation) -> outputs by name. Floating-point outputs are differentiated.
    differentiable: the names of the tensors whose gradients are checked.
    dtypes: which dtypes the grid runs.
    """

    op: str
    call: Callable[[Tensors, dict, str], Tensors]
    differentiable: tuple[str, ...]
    cases: tuple[Case, ...]
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)


def evaluate(op: OpCases, case: Case, tensors: Tensors, implementation: str) -> Tensors:
    """Outputs and gradients ("d<name>") of one call; upstream gradients depend on the output's name alone."""
    leaves = {
        name: tensor.detach().requires_grad_() if name in op.differentiable and tensor is not None else tensor
        for name, tensor in tensors.items()
    }
    with poisoned_memory():
        outputs = op.call(leaves, case.arguments, implementation)
        flowing = {name: out for name, out in outputs.items() if out.requires_grad}
        wanted = {name: leaves[name] for name in op.differentiable if leaves.get(name) is not None}
        upstream = [_upstream(name, out) for name, out in flowing.items()]
        found = torch.autograd.grad(list(flowing.values()), list(wanted.values()), upstream) if flowing else ()
    gradients = {f"d{name}": gradient for name, gradient in zip(wanted, found, strict=bool(flowing))}
    return {name: tensor.detach() for name, tensor in (outputs | gradients).items()}


def _upstream(name: str, out: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(name.encode()))
    noise = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    # rounded to bf16, so that every dtype is given the same numbers (and the oracle too)
    return noise.to(torch.bfloat16).to(out.device, out.dtype)


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill every new, uninitialised tensor with NaN, so that a value nobody wrote is seen."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def to_oracle(tensors: Tensors) -> Tensors:
    """The same inputs in float64 on the CPU."""
    return {
        name: tensor.cpu().double() if torch.is_tensor(tensor) and tensor.is_floating_point()
        else tensor.cpu() if torch.is_tensor(tensor) else tensor
        for name, tensor in tensors.items()
    }  # fmt: skip


def check(
    op: OpCases, case: Case, implementation: str, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> dict:
    """Run the case and assert the rule. Returns {name: (error, eager's error)} for reports."""
    tensors = case.make(dtype, device, torch.Generator().manual_seed(seed))
    exact = evaluate(op, case, to_oracle(tensors), "reference")
    eager = evaluate(op, case, tensors, "reference")
    ours = evaluate(op, case, tensors, implementation)
    assert ours.keys() == exact.keys()
    return {name: assert_close(name, ours[name], eager[name], exact[name]) for name in exact}


def assert_close(name: str, ours: torch.Tensor, eager: torch.Tensor, exact: torch.Tensor) -> tuple[float, float]:
    """Assert the rule for one tensor; integers must be equal."""
    assert ours.shape == exact.shape, f"{name}: shape {list(ours.shape)}, expected {list(exact.shape)}"
    assert ours.dtype == eager.dtype, f"{name}: dtype {ours.dtype}, expected {eager.dtype}"
    if ours.numel() == 0:
        return 0.0, 0.0
    if not ours.is_floating_point():
        assert torch.equal(ours.cpu(), exact.to(ours.dtype).cpu()), f"{name}: integers differ"
        return 0.0, 0.0
    unit, float32_unit = torch.finfo(ours.dtype).eps, torch.finfo(torch.float32).eps
    ours, eager = ours.to(exact.device).double(), eager.to(exact.device).double()
    finite = torch.isfinite(exact)
    assert torch.equal(ours[~finite], exact[~finite]), f"{name}: infinities are not where the oracle has them"
    assert torch.isfinite(ours[finite]).all(), f"{name}: not finite, or never written"
    if not finite.any():
        return 0.0, 0.0
    norms = (("largest", _largest, unit), ("root mean square", _rms, unit / 2 + float32_unit))
    for norm, measure, rounding in norms if exact.numel() > 1 else norms[:1]:
        error, eager_error = measure((ours - exact)[finite]), measure((eager - exact)[finite])
        budget = 2 * eager_error + rounding * measure(exact[finite])
        assert error <= budget, (
            f"{name}: {norm} error {error:.3g} is over the budget {budget:.3g} (eager's error {eager_error:.3g})"
        )
    return error, eager_error


def _largest(error: torch.Tensor) -> float:
    return error.abs().max().item()


def _rms(error: torch.Tensor) -> float:
    return error.square().mean().sqrt().item()
