"""The last traced step as rows of rectangles, small enough to lie in a page."""

from __future__ import annotations

from typing import Any

from tilestack.app.trace.events import Events, HostEvent
from tilestack.app.trace.recording import MODULE, STEP
from tilestack.app.trace.units import Traced, Unit
from tilestack.distributed.stages import PREFIX as STAGE

MOST_HOST_EVENTS = 6000
DEEPEST = 5


def timeline(events: Events, found: Traced, entries: list[tuple]) -> dict[str, Any]:
    """The last step: lanes of events [start, duration, name, entry, depth].

    Times are microseconds from the step's begin; name is an index into `names`, entry one into `entries` of the
    picture in their order (-1: none), depth the row inside the lane. left_out: how many short host ranges are not
    there.
    """
    last = len(found.steps) - 1
    step, window = found.steps[last], found.windows[last]
    zero, end = min(step.start, window[0]), max(step.end, window[1])
    names = _Names()
    units = [unit for unit in found.units if unit.step == last]
    index = {entry: number for number, entry in enumerate(entries)}

    def row(unit: Unit, depth: int) -> list:
        place = unit.place
        entry = index.get((place.layer, place.part, place.what, place.implementation), -1)
        return [round(unit.start - zero, 1), round(unit.duration, 1), names.of(unit.name), entry, depth]

    host, left_out = _host_ranges(events, step)
    lanes = [
        {
            "name": "host" if thread == step.thread else f"host, thread {number}",
            "kind": "host",
            "events": [
                [round(event.start - zero, 1), round(event.duration, 1), names.of(_short(event.name)), -1, depth]
                for event, depth in host
                if event.thread == thread
            ],
        }
        for number, thread in enumerate(_threads(host, step.thread))
    ]
    for lane in sorted({unit.lane for unit in units}):
        rows = [row(unit, _inside(unit, found)) for unit in units if unit.lane == lane]
        name = f"stream {lane}" if found.on_gpu else "operators" if lane == step.thread else f"operators, {lane}"
        lanes.append({"name": name, "kind": "device", "events": rows})
    return {"duration": round(end - zero, 1), "names": names.all, "lanes": lanes, "left_out": left_out}


class _Names:
    def __init__(self) -> None:
        self.all: list[str] = []
        self._index: dict[str, int] = {}

    def of(self, name: str) -> int:
        """The place of a name in the list."""
        if name not in self._index:
            self._index[name] = len(self.all)
            self.all.append(name)
        return self._index[name]


def _host_ranges(events: Events, step: HostEvent) -> tuple[list[tuple[HostEvent, int]], int]:
    """Ranges of the step with their depth below it; of too many, the longest."""
    inside = [event for event in events.host if step.start <= event.start < step.end and event.name != STEP]
    shown = [(event, event.depth - (step.depth + 1 if event.thread == step.thread else 0)) for event in inside]
    shown = [(event, depth) for event, depth in shown if depth < DEEPEST]
    if len(shown) > MOST_HOST_EVENTS:
        shortest = sorted((event.duration for event, _ in shown), reverse=True)[MOST_HOST_EVENTS]
        shown = [(event, depth) for event, depth in shown if event.duration > shortest]
    return shown, len(inside) - len(shown)


def _threads(host: list[tuple[HostEvent, int]], main: int) -> list[int]:
    return sorted({event.thread for event, _ in host}, key=lambda thread: (thread != main, thread))


def _inside(unit: Unit, found: Traced) -> int:
    """How many operators an operator on the CPU lies in; kernels of a stream never overlap."""
    if found.on_gpu or unit.host is None:
        return 0
    return min(sum(each.kind == "cpu_op" for each in unit.host.chain()) - 1, DEEPEST - 1)


def _short(name: str) -> str:
    return name.removeprefix(MODULE).removeprefix(STAGE) or "model"
