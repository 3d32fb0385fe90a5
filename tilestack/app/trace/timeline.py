"""One traced step as rows of rectangles, small enough to lie in a page."""

from __future__ import annotations

from typing import Any

from tilestack.app.trace.events import Events, HostEvent
from tilestack.app.trace.recording import MODULE, STEP
from tilestack.app.trace.units import Traced, Unit
from tilestack.distributed.stages import PREFIX as STAGE

MOST_HOST_EVENTS = 6000
DEEPEST = 5


def timeline(events: Events, found: Traced, entries: list[tuple]) -> dict[str, Any]:
    """The last step but one, from the host's first move to the device's last.

    A lane has events [start, duration, name, entry, depth]. Times are microseconds; name is an index into `names`,
    entry one into `entries` of the picture in their order (-1: none), depth the row inside the lane. view: the device's
    part, in which the host is often at work on the next step (the last step has none). left_out: how many short host
    ranges are not there.
    """
    number = max(0, len(found.steps) - 2)
    step, window = found.steps[number], found.windows[number]
    zero, end = min(step.start, window[0]), max(step.end, window[1])
    names = _Names()
    units = [unit for unit in found.units if unit.step == number]
    index = {entry: at for at, entry in enumerate(entries)}

    def row(unit: Unit, depth: int) -> list:
        place = unit.place
        entry = index.get((place.layer, place.part, place.what, place.implementation), -1)
        return [round(unit.start - zero, 1), round(unit.duration, 1), names.of(unit.name), entry, depth]

    host, left_out = _host_ranges(events, zero, end)
    on_host = [
        {
            "name": "host" if thread == step.thread else f"host, thread {at}",
            "kind": "host",
            "events": [
                [round(event.start - zero, 1), round(event.duration, 1), names.of(short(event.name)), -1, depth]
                for event, depth in host
                if event.thread == thread
            ],
        }
        for at, thread in enumerate(_threads(host, step.thread))
    ]
    lanes = []
    for lane in sorted({unit.lane for unit in units}):
        rows = [row(unit, _inside(unit, found)) for unit in units if unit.lane == lane]
        name = f"stream {lane}" if found.on_gpu else "operators" if lane == step.thread else f"operators, {lane}"
        lanes.append({"name": name, "kind": "device", "events": rows})
    view = [round(each - zero, 1) for each in window]
    duration = round(end - zero, 1)
    return {"duration": duration, "view": view, "names": names.all, "lanes": lanes + on_host, "left_out": left_out}


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


def _host_ranges(events: Events, begin: float, end: float) -> tuple[list[tuple[HostEvent, int]], int]:
    """Ranges of the host in this time with their depth; of too many, the longest."""
    inside = [event for event in events.host if begin <= event.start < end]
    least = {thread: min(e.depth for e in inside if e.thread == thread) for thread in {e.thread for e in inside}}
    shown = [(event, event.depth - least[event.thread]) for event in inside]
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


def short(name: str) -> str:
    """The name of a range of the host as people know it: of a module, of a stage, or an operator's."""
    if name == STEP:
        return "step"
    return name.removeprefix(MODULE).removeprefix(STAGE) or "the whole model"
