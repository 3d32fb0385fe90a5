"""What the device could do: the denominator of MFU, and its memory."""

from __future__ import annotations

import os
import re
import resource

import torch

# dense bf16 TFLOP/s with float32 accumulation, from the makers' data sheets; the first words that the device's name has
PEAK_TFLOPS = {
    "GH200": 989.5,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.5,
    "H200": 989.5,
    "H800": 989.5,
    "GB200": 2500.0,
    "B200": 2250.0,
    "A100": 312.0,
    "A800": 312.0,
    "A40": 149.7,
    "A10": 125.0,
    "L40S": 362.0,
    "L4": 121.0,
    "RTX 4090": 165.2,
    "RTX 3090": 71.0,
    "MI300X": 1307.4,
    "MI250X": 383.0,
}


def peak_flops(device: torch.device) -> float | None:
    """Floating-point operations per second that the device's maker promises in bf16; None if unknown, and on a CPU."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak * 1e12 for words, peak in PEAK_TFLOPS.items() if re.search(rf"\b{words}\b", name)), None)


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory in use so far: of the device by torch, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def describe(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'' if threads == 1 else 's'} of {os.cpu_count()} cores"
