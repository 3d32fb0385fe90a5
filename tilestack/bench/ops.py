"""`tilestack bench ops`: every implementation of every op at Qwen3-30B-A3B's shapes, in one run.

Two kinds of rows. The inputs of the first are the `gpu_only` cases of the shared grid: what is timed is what
`make test-gpu` checks. Those of the second are `problems.py`: 16,384 tokens, beside Liger-Kernel, torch.compile and
others, with GB/s or TFLOP/s over what the op at least moves or computes.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from tilestack.bench.problems import PROBLEMS, Problem, Tensors, Variant
from tilestack.bench.results import FOLDER, Recorder, Row
from tilestack.bench.timing import ceilings, measure
from tilestack.kernels import UnsupportedError, ops
from tilestack.kernels.device import Device
from tilestack.testing.cases import all_cases
from tilestack.testing.compare import Case, OpCases

DTYPE = torch.bfloat16
WRONG = 0.02  # relative: a scale that is off by a few per cent is a mistake, bf16 is not


def calls(op: OpCases, case: Case, implementation: str) -> dict[str, Callable[[], object]]:
    """The forward alone, and forward with backward, as functions without arguments."""
    tensors = case.make(DTYPE, torch.device("cuda"), torch.Generator().manual_seed(0))
    leaves = {
        name: tensor.detach().requires_grad_() if name in op.differentiable and tensor is not None else tensor
        for name, tensor in tensors.items()
    }
    wanted = [leaves[name] for name in op.differentiable if leaves.get(name) is not None]

    def forward() -> object:
        with torch.no_grad():
            return op.call(tensors, case.arguments, implementation)

    upstream = []  # made in the first call, which is not timed

    def both() -> object:
        outputs = [out for out in op.call(leaves, case.arguments, implementation).values() if out.requires_grad]
        upstream.extend(torch.randn_like(out) for out in outputs[len(upstream) :])
        return torch.autograd.grad(outputs, wanted, upstream)

    return {"forward": forward, "both": both} if wanted else {"forward": forward}


def rows_of(op: OpCases, case: Case, implementation: str, repeats: int) -> list[Row]:
    """The rows of one implementation on one case."""
    described = {"case": case.name, "dtype": str(DTYPE).removeprefix("torch.")}
    rows = []
    try:
        for direction, call in calls(op, case, implementation).items():
            timing = measure(call, repeats)
            rows.append(
                Row(
                    op.op,
                    described,
                    implementation,
                    direction,
                    ms_median=timing.median,
                    ms_min=timing.low,
                    ms_max=timing.high,
                    peak_gib=timing.peak_gib,
                    overhead_us=timing.overhead_us,
                    cold_s=timing.cold_s,
                )
            )
    except (RuntimeError, UnsupportedError) as failure:
        rows.append(Row(op.op, described, implementation, "both", error=f"{type(failure).__name__}: {failure}"[:300]))
    gc.collect()
    torch.cuda.empty_cache()
    return rows


def problem_calls(problem: Problem, tensors: Tensors, variant: Variant) -> dict[str, Callable[[], object]]:
    """As `calls`, of one variant of a problem; an op that works in place has a forward alone."""
    leaves = {
        name: tensor.detach().requires_grad_() if name in problem.differentiable else tensor
        for name, tensor in tensors.items()
    }
    wanted = [leaves[name] for name in problem.differentiable]

    def forward() -> object:
        with torch.no_grad():
            return variant(tensors)

    upstream = []  # made in the first call, which is not timed

    def both() -> tuple[torch.Tensor, ...]:
        outputs = variant(leaves)
        upstream.extend(torch.randn_like(out) for out in outputs[len(upstream) :])
        return (*outputs, *torch.autograd.grad(outputs, wanted, upstream))

    return {"forward": forward, "both": both} if wanted else {"forward": forward}


def results(problem: Problem, variant: Variant) -> list[torch.Tensor]:
    """Outputs and gradients of a variant; the tensors are the same at each call."""
    torch.manual_seed(0)
    *_, call = problem_calls(problem, problem.make(), variant).values()
    torch.manual_seed(1)  # for the upstream gradients: what a variant draws must not change them
    return [each.detach().float() for each in call()]


def refuse_wrong(found: list[torch.Tensor], right: list[torch.Tensor]) -> None:
    """Raise RuntimeError unless the root mean square of every error is within WRONG of the size of what is right."""
    for index, (one, other) in enumerate(zip(found, right, strict=True)):
        error = ((one - other).norm() / other.norm()).item()
        if not error <= WRONG:
            raise RuntimeError(f"wrong: result {index} is off by {error:.1%}")


def problem_rows(problem: Problem, repeats: int, untimed: tuple[str, ...] = ()) -> Iterator[Row]:
    """The rows of every variant of a problem; one that fails, is missing or is wrong says so in its row.

    untimed: variants that are no rivals, only what the others are held to.
    """
    right = None
    for name, variant in problem.variants.items():
        try:
            found = results(problem, variant)
            right = found if right is None else right
            refuse_wrong(found, right)
            del found
            gc.collect()
            torch.cuda.empty_cache()
            if name not in untimed:
                yield from _timed(problem, name, variant, repeats)
        except Exception as failure:  # whatever a rival raises is its row
            error = f"{type(failure).__name__}: {failure}"[:300]
            yield Row(problem.op, problem.case, name, "both", error=error)
        gc.collect()
        torch.cuda.empty_cache()


def _timed(problem: Problem, name: str, variant: Variant, repeats: int) -> Iterator[Row]:
    tensors = problem.make()
    held = torch.cuda.memory_allocated() / 2**30
    for direction, call in problem_calls(problem, tensors, variant).items():
        timing = measure(call, repeats)
        rates = {
            kind: amounts[direction] / timing.median / scale if direction in amounts else None
            for kind, amounts, scale in (("gbps", problem.bytes, 1e6), ("tflops", problem.flops, 1e9))
        }
        yield Row(
            problem.op, problem.case, name, direction, **rates,
            ms_median=timing.median, ms_min=timing.low, ms_max=timing.high, peak_gib=timing.peak_gib - held,
            overhead_us=timing.overhead_us, cold_s=timing.cold_s,
        )  # fmt: skip


def run(only: list[str] | None = None, repeats: int = 20, folder: Path = FOLDER) -> Path:
    """Time every implementation that runs here on every large case; prints, and writes the result file, as it goes."""
    limits = ceilings()
    print(f"ceilings: {limits}", flush=True)
    device = Device.current()
    recorder = Recorder("ops", limits, folder, describe)
    for name, op in all_cases().items():
        if only and name not in only:
            continue
        for case in (each for each in op.cases if each.gpu_only):
            for implementation in ops()[name].implementations:
                if implementation.refuses_machine(device):
                    continue
                for row in rows_of(op, case, implementation.name, repeats):
                    recorder.add(row)
    for name, make in PROBLEMS.items():
        for row in problem_rows(make(), repeats) if not only or name in only else ():
            recorder.add(row)
    return recorder.finish()


def describe(row: Row) -> str:
    """One line for the terminal."""
    what = f"{row.op:22} {row.case['case']:36} {row.implementation:18} {row.direction:8}"
    if row.error:
        return f"{what} {row.error}"
    rate = f"{row.gbps:6.0f} GB/s" if row.gbps else f"{row.tflops:6.0f} TFLOP/s" if row.tflops else ""
    return f"{what} {row.ms_median:9.3f} ms  {row.peak_gib:6.1f} GiB  host {row.overhead_us:6.0f} us  {rate}"
