"""`tilestack bench ops`: every implementation of every op at Qwen3-30B-A3B's shapes, in one run.

The inputs are the `gpu_only` cases of the shared grid: what is timed is what `make test-gpu` checks.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

import torch

from tilestack.bench.results import FOLDER, Row, write
from tilestack.bench.timing import ceilings, measure
from tilestack.kernels import UnsupportedError, ops
from tilestack.kernels.device import Device
from tilestack.testing.cases import all_cases
from tilestack.testing.compare import Case, OpCases

DTYPE = torch.bfloat16


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

    def both() -> object:
        outputs = [out for out in op.call(leaves, case.arguments, implementation).values() if out.requires_grad]
        return torch.autograd.grad(outputs, wanted, [torch.ones_like(out) for out in outputs])

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


def run(only: list[str] | None = None, repeats: int = 20, folder: Path = FOLDER) -> Path:
    """Time every implementation that runs here on every large case, print as it goes, write the result file."""
    limits = ceilings()
    print(f"ceilings: {limits}", flush=True)
    device = Device.current()
    rows = []
    for name, op in all_cases().items():
        if only and name not in only:
            continue
        for case in (each for each in op.cases if each.gpu_only):
            for implementation in ops()[name].implementations:
                if implementation.refuses_machine(device):
                    continue
                for row in rows_of(op, case, implementation.name, repeats):
                    rows.append(row)
                    print(describe(row), flush=True)
    return write("ops", rows, limits, folder)


def describe(row: Row) -> str:
    """One line for the terminal."""
    what = f"{row.op:22} {row.case['case']:36} {row.implementation:18} {row.direction:8}"
    if row.error:
        return f"{what} {row.error}"
    return f"{what} {row.ms_median:9.3f} ms  {row.peak_gib:6.1f} GiB  host {row.overhead_us:6.0f} us"
