"""Timing on a GPU: medians over events, with the caches and the clock in the state of real work."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """Milliseconds on the GPU over the repeats, peak memory, and the first call's seconds."""

    median: float
    low: float
    high: float
    peak_gib: float
    cold_s: float


def measure(call: Callable[[], object], repeats: int = 20, warmup: int = 3) -> Timing:
    """Time `call`: the first call apart (it compiles), then `warmup` untimed and `repeats` timed ones."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    call()
    torch.cuda.synchronize()
    cold_s = time.perf_counter() - started
    for _ in range(warmup):
        call()
    torch.cuda.reset_peak_memory_stats()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, end in events:
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    times = [start.elapsed_time(end) for start, end in events]
    peak = torch.cuda.max_memory_allocated() / 2**30
    return Timing(statistics.median(times), min(times), max(times), peak, cold_s)


def ceilings() -> dict[str, float]:
    """What this device reaches: a bf16 product of 8192 cubed in TFLOP/s, a copy of 1 GiB in GB/s (read + written)."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = measure(lambda: a @ b)
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    copy = measure(lambda: target.copy_(source))
    return {
        "matmul_tflops": round(2 * 8192**3 / product.median / 1e9, 1),
        "copy_gbps": round(2 * source.numel() / copy.median / 1e6, 1),
    }
