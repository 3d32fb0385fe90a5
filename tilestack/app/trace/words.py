"""How figures are written, on the terminal and on the page alike."""

from __future__ import annotations

import re
from typing import Any

from tilestack.app.explain import FOLDERS
from tilestack.app.trace.attribution import LIBRARIES

SMALL = 0.005  # shares below are summed up
OTHER_SAYS = "what the profile does not let us place"


def folder_of(layer: str) -> str:
    """Where a box of the picture lives."""
    return FOLDERS.get(layer, OTHER_SAYS)


def title_of(layer: str, device: str) -> str:
    """The box's title; on a CPU the libraries are others."""
    return "MKL, oneDNN" if layer == LIBRARIES and device == "cpu" else layer


def milliseconds(value: float) -> str:
    """Three digits that count: 123, 12.3, 1.23, 0.123; "" for what took nothing."""
    if value < 5e-4:
        return ""
    digits = 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3
    return f"{value:,.{digits}f}"


def kernel_name(name: str, most: int = 96) -> str:
    """A kernel's name without what every name has: return type, arguments, namespaces; cut at `most` characters."""
    mangled = re.match(r"_ZN((?:\d+\w+?)+)I", name)
    if mangled:  # Itanium's way to write a nested name: each part after its length
        parts, rest = [], mangled[1]
        while found := re.match(r"\d+", rest):
            end = len(found[0]) + int(found[0])
            parts.append(rest[len(found[0]) : end])
            rest = rest[end:]
        name = "::".join(parts) + "<...>"
    name = re.sub(r"^void |\(anonymous namespace\)::|\b(?:at::native|at::cuda|at_cuda_detail|c10|std)::", "", name)
    return name if len(name) <= most else name[: most - 3] + "..."


def percent(share: float) -> str:
    """A share in percent, "" for nothing."""
    return "" if share <= 0 else "<0.1%" if share < 5e-4 else f"{share:.1%}"


def rate(entry: dict[str, Any]) -> str:
    """The rate that bounds an op: TFLOP/s where arithmetic does, GB/s where the memory does; "" if it is not known."""
    if entry["bound"] == "matmul":
        return flops(entry["tflops"])
    return traffic(entry["gbps"]) if entry["bound"] == "copy" else ""


def flops(tflops: float) -> str:
    """A rate of arithmetic in the unit that suits it."""
    return f"{_number(tflops)} TFLOP/s" if tflops >= 1 else f"{_number(1e3 * tflops)} GFLOP/s"


def traffic(gbps: float) -> str:
    """A rate of traffic in the unit that suits it."""
    return f"{_number(gbps)} GB/s" if gbps >= 1 else f"{_number(1e3 * gbps)} MB/s"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def kernels_are(device: str) -> str:
    """What this page calls kernels."""
    if device == "cpu":
        return (
            "This machine has no GPU: what is listed are operators of PyTorch on the CPU, each with the time that it "
            "took by itself. tilestack's kernels did not run: on a CPU every op is its reference in plain PyTorch."
        )
    return "What is listed are kernels of the GPU with their own time on it."


def headline(run: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(name, figure, remark) of what matters most in a run."""
    busy = run["busy_ms"] / run["traced_ms"] if run["traced_ms"] else 0.0
    return [
        ("step", f"{milliseconds(run['step_ms'])} ms", f"{milliseconds(run['traced_ms'])} ms under the profiler"),
        ("tokens", f"{run['tokens_per_s']:,.0f} /s", f"{run['tokens']:,} a step"),
        ("model's arithmetic", flops(run["tflops"]), f"{run['of_ceiling']:.0%} of the measured ceiling"),
        ("device busy", f"{busy:.1%}", f"{milliseconds(run['idle_ms']) or 0} ms idle a step"),
        ("host", f"{milliseconds(run['host_ms'])} ms", _waits(run)),
        ("peak memory", f"{run['peak_gib']:.1f} GiB", f"{run['parameters']:,} parameters"),
    ]


def _waits(run: dict[str, Any]) -> str:
    if run["host_ahead_us"] is None:
        return "is the device"
    waits = (
        f"waits for the device {run['host_waits']:g} times a step"
        if run["host_waits"]
        else "never waits for the device"
    )
    return f"{waits}; {milliseconds(run['host_ahead_us'] / 1e3)} ms ahead of it"


def compared(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Both runs by part of the model: part, ours and theirs in ms, theirs over ours.

    Parts that are small in both are one row; the last one is the whole step.
    """
    ours, theirs = runs
    rows = []
    parts = {run["name"]: {row["part"]: row["ms"] for row in run["parts"]} for run in runs}
    for part in dict.fromkeys([*parts[ours["name"]], *parts[theirs["name"]]]):
        rows.append(_ratio(part, parts[ours["name"]].get(part, 0.0), parts[theirs["name"]].get(part, 0.0)))
    rows.sort(key=lambda row: -max(row["ours"], row["theirs"]))
    small = [row for row in rows if max(row["ours"], row["theirs"]) < SMALL * theirs["device_ms"]]
    rows = rows[: len(rows) - len(small)]
    if small:
        names = ", ".join(row["part"] for row in small)
        rows.append(_ratio(names, sum(row["ours"] for row in small), sum(row["theirs"] for row in small)))
    rows.append(_ratio("idle", ours["idle_ms"], theirs["idle_ms"]))
    rows.append(_ratio("whole step, without the profiler", ours["step_ms"], theirs["step_ms"]))
    return rows


def _ratio(part: str, ours: float, theirs: float) -> dict[str, Any]:
    return {"part": part, "ours": ours, "theirs": theirs, "ratio": theirs / ours if ours > 0 else None}
