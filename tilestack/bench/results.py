"""Result files: one file is one run on one machine, replaced by a newer run; history is in git.

    {"bench", "device", "versions", "commit", "date", "ceilings", "rows": [...]}

A row has the keys of `Row`. Rates and memory are per GPU; a figure that has no meaning for a row is null. Rivals are
rows of the same run.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "bench" / "results"
PACKAGES = (
    "torch", "triton", "transformers", "deepspeed", "flash-attn", "flash-attn-4", "nvidia-cutlass-dsl", "xformers",
    "liger-kernel", "sonic-moe", "cut-cross-entropy",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One measurement.

    op: "step", "attention", ...; case: what was run; implementation: who ran it.
    direction: "forward", "backward", "both" or "step".
    ms_*: milliseconds of one call on the GPU. tflops, gbps: achieved TFLOP/s and GB/s (1e9 bytes).
    peak_gib: highest memory allocated during the call. overhead_us: host time of a call. cold_s: the first call;
    warm_s: the first call of a second process, which finds compiled kernels on the disk.
    error: relative error against the oracle where the benchmark checks one, or why the row could not be measured.
    losses: the first losses of a training run, for `step`.
    collective_ms, exposed_ms, idle_ms: of a step on several GPUs, how long collectives ran on the GPU, how long nothing
    else ran beside them, and how long nothing ran at all. gib: memory by what holds it or when, for `plan`.
    """

    op: str
    case: dict[str, Any]
    implementation: str
    direction: str
    ms_median: float | None = None
    ms_min: float | None = None
    ms_max: float | None = None
    tflops: float | None = None
    gbps: float | None = None
    peak_gib: float | None = None
    tokens_per_s: float | None = None
    overhead_us: float | None = None
    cold_s: float | None = None
    warm_s: float | None = None
    error: float | str | None = None
    losses: list[float] | None = None
    collective_ms: float | None = None
    exposed_ms: float | None = None
    idle_ms: float | None = None
    gib: dict[str, float] | None = None


def write(bench: str, rows: list[Row], ceilings: dict[str, float], folder: Path = FOLDER) -> Path:
    """Write the run's file, atomically, and return its path: <folder>/<bench>/<gpus>x<device>.json."""
    gpus = max((row.case.get("gpus", 1) for row in rows), default=1)
    rounded = [{key: _rounded(value) for key, value in dataclasses.asdict(row).items()} for row in rows]
    return save(record(bench, rounded, ceilings), folder / bench / f"{gpus}x{short_device()}.json")


def record(bench: str, rows: list[dict[str, Any]], ceilings: dict[str, float]) -> dict[str, Any]:
    """A result file's content: the rows, and what they were measured with."""
    return {
        "bench": bench,
        "device": device_name(),
        "versions": versions(),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "ceilings": ceilings,
        "rows": rows,
    }


def save(content: dict[str, Any], path: Path) -> Path:
    """Write a result file, atomically; returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(partial, path)
    return path


class Recorder:
    """A run's rows: each is printed and the file written anew, so that a run that is stopped keeps what it measured."""

    def __init__(self, bench: str, ceilings: dict[str, float], folder: Path, describe: Callable[[Row], str]):
        self.bench, self.ceilings, self.folder, self.describe = bench, ceilings, folder, describe
        self.rows: list[Row] = []

    def add(self, row: Row) -> Path:
        """Print a row and write the file with all so far; returns the file's path."""
        self.rows.append(row)
        print(self.describe(row), flush=True)
        return self.finish()

    def finish(self) -> Path:
        """The file, written also where no row came."""
        return write(self.bench, self.rows, self.ceilings, self.folder)


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}")
    return [_rounded(each) for each in value] if isinstance(value, list) else value


def read(path: Path) -> dict[str, Any]:
    """A result file's content."""
    return json.loads(path.read_text())


def device_name() -> str:
    """The marketing name of the device that was measured."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()


def short_device() -> str:
    """ "H100" for "NVIDIA H100 80GB HBM3"; what the file is named by."""
    found = re.search(r"\b([A-Z]{1,3}\d{2,4}[A-Z]?|RTX \w+|MI\d+\w*)\b", device_name())
    return (found.group(1) if found else device_name()).replace(" ", "")


@functools.cache
def versions() -> dict[str, str]:
    """Versions of what matters to speed, as far as installed."""
    found = {"python": platform.python_version(), "cuda": str(torch.version.cuda)}
    if torch.backends.cudnn.is_available():
        found["cudnn"] = str(torch.backends.cudnn.version())
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


measured_commit: str | None = None  # named by the user, where the sources are a copy without history


@functools.cache
def commit() -> str:
    """The commit that was measured, "unknown" outside a checkout where nobody named it."""
    if measured_commit is not None:
        return measured_commit
    done = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"
