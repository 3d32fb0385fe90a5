"""The figures of a traced run: what trace.json holds and what the terminal and the page show.

Times are milliseconds of one step, the mean over the traced steps. A share is of the device's working time (the sum
over all kernels; on a CPU over all operators), so shares add up to 1; idle time stands beside it.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from tilestack.app.trace.attribution import (
    BACKWARD,
    FORWARD,
    KERNELS,
    LAYERS,
    LIBRARIES,
    OWNERS,
    PARTS,
    RECOMPUTE,
    Place,
)
from tilestack.app.trace.events import Events, HostEvent, read
from tilestack.app.trace.rates import Rates
from tilestack.app.trace.timeline import short, timeline
from tilestack.app.trace.units import Places, Traced, Unit, covered, traced
from tilestack.distributed.stages import PREFIX as STAGE

DIRECTIONS = (FORWARD, BACKWARD, RECOMPUTE)
MOST_GAPS = 6
_WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")


@dataclass(frozen=True)
class Step:
    """What a step is, in numbers of the model: the same for every run that is compared.

    tokens, flops: of one step on this device, by models/flops.py. pairs: query and key pairs of one micro-batch that
    attention sees, for one head.
    """

    tokens: int
    flops: float
    pairs: float


@dataclass
class _Entry:
    place: Place
    ms: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    flops: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    bytes: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    host_ms: float = 0.0
    calls: set[int] = field(default_factory=set)
    kernels: dict[tuple[str, str], list[Unit]] = field(default_factory=lambda: defaultdict(list))


def summarise(trace: dict[str, Any], on_gpu: bool, step: Step, ceilings: dict[str, float]) -> dict[str, Any]:
    """The figures of one run from the profiler's trace. Raises ValueError for a trace that has no two steps.

    ceilings: matmul_tflops and copy_gbps of the device, which rates are held against.
    """
    events, places = read(trace), Places()
    found = traced(events, on_gpu, places)
    entries = _entries(found, events, places, Rates(events.host, step.pairs))
    count = len(found.steps)
    device_ms = sum(unit.time for unit in found.units) / count / 1e3
    layers = [_layer(title, entries, count, device_ms, ceilings) for title in LAYERS]
    return {
        "steps": count,
        **_clock(found, events, device_ms),
        "tokens": step.tokens,
        "flops": step.flops,
        "layers": [layer for layer in layers if layer["entries"] or layer["layer"] != LAYERS[-1]],
        "owners": _owners(found.units, count, device_ms),
        "parts": _parts(found.units, count),
        "timeline": timeline(events, found, [_key(entry["id"]) for layer in layers for entry in layer["entries"]]),
    }


def _key(identity: list[str]) -> tuple[str, ...]:
    return tuple(identity)


def _identity(place: Place) -> tuple[str, str, str, str]:
    return place.layer, place.part, place.what, place.implementation


def _entries(found: Traced, events: Events, places: Places, rates: Rates) -> dict[tuple, _Entry]:
    entries: dict[tuple, _Entry] = {}

    def entry(place: Place) -> _Entry:
        return entries.setdefault(_identity(place), _Entry(place))

    counted: set[tuple[int, tuple]] = set()
    for unit in found.units:
        into = entry(unit.place)
        into.ms[unit.place.direction] += unit.time / 1e3
        into.kernels[unit.owner, unit.name].append(unit)
        has_work = unit.place.layer in (KERNELS, LIBRARIES)
        work = rates.of(unit.host, places.around(unit.host)) if has_work else None
        if work is not None:
            call, flops, traffic = work
            key = (id(call), _identity(unit.place))
            if key not in counted:
                counted.add(key)
                into.calls.add(id(call))
                into.flops[unit.place.direction] += flops
                into.bytes[unit.place.direction] += traffic
    for event in _of_steps(events.host, found.steps):
        if event.name == STAGE + BACKWARD:
            continue  # what it does by itself is to wait for the thread of autograd
        where = places.of_operator(event)
        if _identity(where) in entries:
            entries[_identity(where)].host_ms += event.self_us / 1e3
    return entries


def _of_steps(host: list[HostEvent], steps: list[HostEvent]) -> Iterable[HostEvent]:
    first, last = steps[0].start, steps[-1].end
    return (event for event in host if first <= event.start < last)


def _layer(title: str, entries: dict, count: int, device_ms: float, ceilings: dict) -> dict[str, Any]:
    mine = [_described(each, count, device_ms, ceilings) for each in entries.values() if each.place.layer == title]
    mine.sort(key=lambda entry: -entry["ms"])
    ms = sum(entry["ms"] for entry in mine)
    return {"layer": title, "ms": ms, "share": ms / device_ms if device_ms else 0.0, "entries": mine}


def _described(entry: _Entry, count: int, device_ms: float, ceilings: dict[str, float]) -> dict[str, Any]:
    ms = sum(entry.ms.values()) / count
    flops, traffic = sum(entry.flops.values()) / count, sum(entry.bytes.values()) / count
    return {
        "id": list(_identity(entry.place)),
        "what": entry.place.what,
        "part": entry.place.part,
        "implementation": entry.place.implementation,
        "ms": ms,
        "share": ms / device_ms if device_ms else 0.0,
        **{f"{direction}_ms": entry.ms[direction] / count for direction in DIRECTIONS},
        "host_ms": entry.host_ms / count,
        "calls": len(entry.calls) / count,
        **_rate(flops, traffic, ms, ceilings),
        "kernels": _kernels(entry.kernels, count, device_ms),
    }


def _rate(flops: float, traffic: float, ms: float, ceilings: dict[str, float]) -> dict[str, Any]:
    """Achieved rates, and the share of the roofline: the least time that the ceilings allow over the time taken."""
    none = {"tflops": None, "gbps": None, "bound": None, "of_ceiling": None}
    if not ms or not (flops or traffic):
        return none
    by_product = flops / (ceilings["matmul_tflops"] * 1e9)
    by_copy = traffic / (ceilings["copy_gbps"] * 1e6)
    bound = "matmul" if by_product >= by_copy else "copy"
    return {
        "tflops": flops / ms / 1e9 if flops else None,
        "gbps": traffic / ms / 1e6 if traffic else None,
        "bound": bound,
        "of_ceiling": max(by_product, by_copy) / ms,
    }


def _kernels(kernels: dict[tuple[str, str], list[Unit]], count: int, device_ms: float) -> list[dict[str, Any]]:
    rows = []
    for (owner, name), units in kernels.items():
        ms = sum(unit.time for unit in units) / 1e3 / count
        share = ms / device_ms if device_ms else 0.0
        rows.append({"name": name, "owner": owner, "calls": len(units) / count, "ms": ms, "share": share})
    return sorted(rows, key=lambda row: -row["ms"])


def _owners(units: list[Unit], count: int, device_ms: float) -> list[dict[str, Any]]:
    rows = []
    for owner in OWNERS:
        mine = [unit for unit in units if unit.owner == owner]
        if mine:
            ms = sum(unit.time for unit in mine) / 1e3 / count
            share = ms / device_ms if device_ms else 0.0
            rows.append({"owner": owner, "ms": ms, "share": share, "kernels": len(mine) / count})
    return rows


def _parts(units: list[Unit], count: int) -> list[dict[str, Any]]:
    found: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for unit in units:
        found[unit.place.part][unit.place.direction] += unit.time / 1e3 / count
    return [
        {"part": part, "ms": sum(found[part].values()), **{f"{each}_ms": found[part][each] for each in DIRECTIONS}}
        for part in PARTS
        if part in found
    ]


def _clock(found: Traced, events: Events, device_ms: float) -> dict[str, Any]:
    """How long a step took, how much of it the device worked, and who waited for whom."""
    count = len(found.steps)
    window_ms = sum(end - start for start, end in found.windows) / count / 1e3
    busy, gaps = _busy(found)
    waits = [event for event in _of_steps(events.host, found.steps) if event.name in _WAITS]
    lags = [unit.start - unit.host.start for unit in found.units if found.on_gpu and unit.host is not None]
    return {
        "traced_ms": window_ms,
        "device_ms": device_ms,
        "busy_ms": busy / count / 1e3,
        "idle_ms": window_ms - busy / count / 1e3,
        "host_ms": sum(step.duration for step in found.steps) / count / 1e3,
        "host_waits": len(waits) / count,
        "host_waits_ms": sum(event.duration for event in waits) / count / 1e3,
        "host_ahead_us": statistics.median(lags) if lags else None,
        "kernels_per_step": len(found.units) / count,
        "gaps": _largest(gaps, found, events),
    }


def _busy(found: Traced) -> tuple[float, list[tuple[float, float]]]:
    """Microseconds in which something ran, over all steps, and the gaps of the last step."""
    if not found.on_gpu:  # the operators of a thread are inside one another: what they took by themselves adds up
        return sum(unit.time for unit in found.units if unit.lane == found.steps[0].thread), []
    total, gaps = 0.0, []
    for window in found.windows:
        covers, gaps = covered([(unit.start, unit.end) for unit in found.units], window)
        total += covers
    return total, gaps


def _largest(gaps: list[tuple[float, float]], found: Traced, events: Events) -> list[dict[str, Any]]:
    """The longest gaps of the last step: what ran before and after, and what the host was doing."""
    rows = []
    main = found.steps[-1].thread
    for start, end in sorted(gaps, key=lambda gap: gap[0] - gap[1])[:MOST_GAPS]:
        before = max((u for u in found.units if u.end <= start), key=lambda u: u.end, default=None)
        after = min((u for u in found.units if u.start >= end), key=lambda u: u.start, default=None)
        middle = (start + end) / 2
        doing = [event for event in events.host if event.thread == main and event.start <= middle < event.end]
        rows.append(
            {
                "ms": (end - start) / 1e3,
                "after": before.name if before else "",
                "before": after.name if after else "",
                "host": short(max(doing, key=lambda event: event.depth).name) if doing else "",
            }
        )
    return rows
