"""The rule that decides whether an implementation is right.

The oracle is the reference in float64, on the same device. The honest competitor is the reference in the dtype under
test, on the same device ("eager"). An implementation passes if, for every output and every gradient,

    error(implementation, oracle) <= 2 * error(eager, oracle) + rounding

both for the largest error and for the root mean square. `rounding` is what computing the answer in float32 and storing
it may cost even where eager was lucky: of the largest value one unit in the last place; in the root mean square, of
every value half a unit and one unit of float32. It is the second that sees a wrong scale of 1% in bf16, whose unit is
0.8%. Of a single number (a loss) there is no average, so only the largest error counts.

Of a few numbers (the gradients of a head's sink) chance decides whose error is twice whose. Where they break the rule,
the case is drawn anew some times, and the rule is asked of all draws together, the first among them.
"""

from __future__ import annotations

import contextlib
import functools
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
    """The same inputs in float64."""
    return {
        name: tensor.double() if torch.is_tensor(tensor) and tensor.is_floating_point() else tensor
        for name, tensor in tensors.items()
    }


FEW = 64  # numbers of a tensor, about which chance decides
DRAWS = 16


def check(
    op: OpCases, case: Case, implementation: str, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """Run the case and assert the rule. Returns {name: (error, eager's error)} for reports."""

    @functools.cache
    def draw(number: int) -> dict[str, tuple[Errors, torch.dtype]]:
        tensors = case.make(dtype, device, torch.Generator().manual_seed(seed + number))
        exact = evaluate(op, case, to_oracle(tensors), "reference")
        eager = evaluate(op, case, tensors, "reference")
        ours = evaluate(op, case, tensors, implementation)
        assert ours.keys() == exact.keys()
        return {name: (errors(name, ours[name], eager[name], exact[name]), ours[name].dtype) for name in exact}

    report = {}
    for name, (found, of) in draw(0).items():
        try:
            report[name] = found.judge(name, of)
        except AssertionError:
            if found.numbers > FEW:
                raise
            drawn = sum((draw(number)[name][0] for number in range(1, DRAWS)), found)
            report[name] = drawn.judge(f"{name} of {DRAWS} draws", of)
    return report


@dataclass(frozen=True)
class Errors:
    """What the rule needs to know of some values, so that those of many calls can be judged together: `+`.

    largest, squares: the largest absolute value and the sum of squares of our error, of eager's, and of the oracle's
    values, where those are finite. count: of finite values; numbers: of all.
    """

    numbers: int
    count: int = 0
    largest: tuple[float, float, float] = (0.0, 0.0, 0.0)
    squares: tuple[float, float, float] = (0.0, 0.0, 0.0)

    def __add__(self, other: Errors) -> Errors:
        largest = tuple(map(max, zip(self.largest, other.largest, strict=True)))
        squares = tuple(map(sum, zip(self.squares, other.squares, strict=True)))
        return Errors(self.numbers + other.numbers, self.count + other.count, largest, squares)

    def judge(self, name: str, dtype: torch.dtype) -> tuple[float, float]:
        """Assert the rule; returns our error and eager's."""
        if not self.count:
            return 0.0, 0.0
        unit, float32_unit = torch.finfo(dtype).eps, torch.finfo(torch.float32).eps
        rms = tuple((each / self.count) ** 0.5 for each in self.squares)
        norms = (("largest", self.largest, unit), ("root mean square", rms, unit / 2 + float32_unit))
        for norm, (error, eager_error, size), rounding in norms if self.numbers > 1 else norms[:1]:
            budget = 2 * eager_error + rounding * size
            assert error <= budget, (
                f"{name}: {norm} error {error:.3g} is over the budget {budget:.3g} (eager's error {eager_error:.3g})"
            )
        return error, eager_error


def assert_close(name: str, ours: torch.Tensor, eager: torch.Tensor, exact: torch.Tensor) -> tuple[float, float]:
    """Assert the rule for one tensor; integers must be equal. Returns our error and eager's."""
    return errors(name, ours, eager, exact).judge(name, ours.dtype)


def errors(name: str, ours: torch.Tensor, eager: torch.Tensor, exact: torch.Tensor) -> Errors:
    """The errors of one tensor. Asserts what needs no measuring: shape, dtype, integers, infinities."""
    assert ours.shape == exact.shape, f"{name}: shape {list(ours.shape)}, expected {list(exact.shape)}"
    assert ours.dtype == eager.dtype, f"{name}: dtype {ours.dtype}, expected {eager.dtype}"
    if ours.numel() == 0:
        return Errors(0)
    if not ours.is_floating_point():
        assert torch.equal(ours.cpu(), exact.to(ours.dtype).cpu()), f"{name}: integers differ"
        return Errors(0)
    ours, eager = ours.to(exact.device).double(), eager.to(exact.device).double()
    finite = torch.isfinite(exact)
    assert torch.equal(ours[~finite], exact[~finite]), f"{name}: infinities are not where the oracle has them"
    assert torch.isfinite(ours[finite]).all(), f"{name}: not finite, or never written"
    if not finite.any():
        return Errors(exact.numel())
    parts = [each[finite] for each in (ours - exact, eager - exact, exact)]
    largest, squares = (tuple(of(each).item() for each in parts) for of in (_largest, _squares))
    return Errors(exact.numel(), len(parts[0]), largest, squares)


def _largest(values: torch.Tensor) -> torch.Tensor:
    return values.abs().max()


def _squares(values: torch.Tensor) -> torch.Tensor:
    return values.square().sum()
