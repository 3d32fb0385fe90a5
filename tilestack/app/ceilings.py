"""What the device at hand reaches: the rates that measured times are held against."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

WARMUP = 3
GPU_SIZE, GPU_BYTES, GPU_REPEATS = 8192, 2**30, 20
CPU_SIZE, CPU_BYTES, CPU_REPEATS = 1024, 2**26, 5


def ceilings(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> dict[str, float]:
    """A product of square matrices in `dtype` in TFLOP/s, and a copy in GB/s (1e9 bytes, read and written).

    On a GPU 8192 cubed and 1 GiB, medians of 20; on a CPU 1024 cubed and 64 MiB, medians of 5.
    """
    on_gpu = device.type == "cuda"
    size, count = (GPU_SIZE, GPU_BYTES) if on_gpu else (CPU_SIZE, CPU_BYTES)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    product = _median_seconds(lambda: torch.mm(a, b), device)
    source = torch.randint(255, (count,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = _median_seconds(lambda: target.copy_(source), device)
    rates = {
        "matmul_tflops": float(f"{2 * size**3 / product / 1e12:.4g}"),
        "copy_gbps": float(f"{2 * count / copy / 1e9:.4g}"),
    }
    if on_gpu:
        del a, b, source, target
        torch.cuda.empty_cache()
    return rates


def _median_seconds(call: Callable[[], object], device: torch.device) -> float:
    for _ in range(WARMUP):
        call()
    if device.type != "cuda":
        times = []
        for _ in range(CPU_REPEATS):
            started = time.perf_counter()
            call()
            times.append(time.perf_counter() - started)
        return statistics.median(times)
    # each of these takes longer than its launch, so that the GPU never waits for the host
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(GPU_REPEATS + 1)]
    for mark in marks[:-1]:
        mark.record()
        call()
    marks[-1].record()
    torch.cuda.synchronize(device)
    return statistics.median(a.elapsed_time(b) for a, b in zip(marks, marks[1:], strict=False)) / 1e3
