"""Timing on a GPU: medians over events, with the caches and the clock in the state of real work."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from tilestack.app import ceilings as measured

CLOCK_HZ = 2e9  # about a GPU's clock: the backlog need not be exact
LONGEST_BACKLOG_S = 1.0
FEWEST = 5


@dataclass(frozen=True)
class Timing:
    """Milliseconds on the GPU over the repeats, peak memory, host microseconds a call, the first call's seconds."""

    median: float
    low: float
    high: float
    peak_gib: float
    overhead_us: float
    cold_s: float


def measure(call: Callable[[], object], repeats: int = 20, warmup: int = 3, budget_ms: float | None = None) -> Timing:
    """Time `call`: the first call apart (it compiles), then `warmup` untimed and `repeats` timed ones.

    With budget_ms, as many timed calls as fit into it on the GPU: `repeats` at most, FEWEST at least.

    The GPU is kept busy while the host enqueues the timed calls, so that a call shorter than its own launch is timed
    by what the GPU does and not by the host, whose time is `overhead_us`.
    """
    torch.cuda.synchronize()
    started = time.perf_counter()
    call()
    torch.cuda.synchronize()
    cold_s = time.perf_counter() - started
    started = time.perf_counter()
    for _ in range(warmup):
        call()
    host_s = (time.perf_counter() - started) / warmup
    if budget_ms is not None:
        repeats = max(FEWEST, min(repeats, int(budget_ms / _once_ms(call))))
    torch.cuda.reset_peak_memory_stats()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    torch.cuda.synchronize()
    torch.cuda._sleep(int(min(1.5 * host_s * repeats, LONGEST_BACKLOG_S) * CLOCK_HZ))
    started = time.perf_counter()
    for start, end in events:
        start.record()
        call()
        end.record()
    overhead_us = (time.perf_counter() - started) / repeats * 1e6
    torch.cuda.synchronize()
    times = [start.elapsed_time(end) for start, end in events]
    peak = torch.cuda.max_memory_allocated() / 2**30
    return Timing(statistics.median(times), min(times), max(times), peak, overhead_us, cold_s)


def _once_ms(call: Callable[[], object]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return max(start.elapsed_time(end), 1e-3)


def host_microseconds(call: Callable[[], object], batches: int = 20, calls: int = 10) -> float:
    """Host time of a call that the GPU is faster at: the median over batches, which are short of the launch queue."""
    call()
    times = []
    for _ in range(batches):
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(calls):
            call()
        times.append((time.perf_counter() - started) / calls * 1e6)
    return statistics.median(times)


def ceilings() -> dict[str, float]:
    """What this GPU reaches: a bf16 product of 8192 cubed in TFLOP/s, a copy of 1 GiB in GB/s (read + written)."""
    return measured.ceilings(torch.device("cuda"))
