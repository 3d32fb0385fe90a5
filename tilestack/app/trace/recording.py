"""Runs training steps under torch's profiler, with the model's modules as named ranges, and gives its raw trace."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from tilestack.app.hardware import peak_memory_bytes

TIMED = 5  # steps against the clock, without the profiler
STEP = "tilestack step"
MODULE = "tilestack module: "
DATA = "tilestack data"


@dataclass(frozen=True)
class Recording:
    """What the profiler saw of some steps.

    trace: the profiler's trace, in the format of Chrome's trace viewer.
    step_ms: wall time of one step without the profiler, the mean of TIMED.
    peak_gib: most memory in use.
    losses: of every step that ran, warm-up included.
    """

    trace: dict[str, Any]
    step_ms: float
    peak_gib: float
    losses: list[float]


def record(
    step: Callable[[], torch.Tensor],
    model: torch.nn.Module,
    device: torch.device,
    warmup: int,
    steps: int,
    traced: bool = True,
    progress: Callable[[str], None] = lambda text: None,
) -> Recording:
    """Run `step`, which returns its loss on the device: `warmup` times, TIMED times against the clock, and traced.

    One step more than `steps` is in the trace: the first starts on an idle device and is not like the others.
    traced: False runs as many steps without a profiler (the ranks that nobody looks at); the trace is then empty.
    """
    losses = []

    def run(what: str, count: int) -> None:
        for number in range(count):
            progress(f"{what} {number + 1} of {count}")
            losses.append(step())

    run("warm-up step", warmup)
    _wait(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    started = time.perf_counter()
    run("timed step", TIMED)
    _wait(device)
    step_ms = (time.perf_counter() - started) / TIMED * 1e3
    peak_gib = peak_memory_bytes(device) / 2**30
    trace: dict[str, Any] = {}
    if traced:
        trace = _profiled(lambda: losses.append(step()), model, device, steps + 1, progress)
    else:
        run("untraced step", steps + 2)
    return Recording(trace, step_ms, peak_gib, [float(loss) for loss in losses])


def _profiled(
    step: Callable[[], None], model: torch.nn.Module, device: torch.device, steps: int, progress: Callable[[str], None]
) -> dict[str, Any]:
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    # the profiler's own first step starts its machinery and is thrown away
    plan = schedule(wait=0, warmup=1, active=steps, repeat=1)
    with module_ranges(model), profile(activities=activities, schedule=plan, record_shapes=True) as profiler:
        for number in range(steps + 1):
            progress(f"traced step {number} of {steps}")
            with record_function(STEP):
                step()
            if number == steps:
                _wait(device)
            profiler.step()
    progress("reading the profile")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return json.loads(path.read_bytes().decode("utf-8", errors="replace"))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def module_ranges(model: torch.nn.Module) -> Iterator[None]:
    """Inside, the forward pass of every module is a range of the profile that has the module's name."""
    handles = []
    for name, module in model.named_modules():
        opened: list[record_function] = []

        def enter(module: torch.nn.Module, args: Any, name: str = name, opened: list = opened) -> None:
            opened.append(record_function(MODULE + name))
            opened[-1].__enter__()

        def leave(module: torch.nn.Module, args: Any, output: Any, opened: list = opened) -> None:
            opened.pop().__exit__(None, None, None)

        handles.append(module.register_forward_pre_hook(enter, prepend=True))
        # also where activation checkpointing stops a recomputation in the middle, with an exception
        handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
