"""What took time in the traced steps, piece by piece, each with its place in the picture.

On a GPU a piece is a kernel or a copy. On a CPU, where the host is the device, it is an operator with the time that it
took by itself, without the operators inside it.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field

from tilestack.app.trace.attribution import Place, Surroundings, owner_of_kernel, owner_of_operator, place, surroundings
from tilestack.app.trace.events import Events, HostEvent
from tilestack.app.trace.recording import STEP


@dataclass(eq=False)
class Unit:
    """A piece of time. Times are in microseconds.

    time: what it took; on a CPU less than its duration if there are operators inside it.
    lane: the GPU's stream or the CPU's thread. host: the launch, or the operator itself; None: the profile has none.
    step: number among the traced steps.
    """

    name: str
    owner: str
    lane: int
    start: float
    duration: float
    time: float
    host: HostEvent | None = field(repr=False)
    place: Place
    step: int

    @property
    def end(self) -> float:
        return self.start + self.duration


@dataclass(frozen=True)
class Traced:
    """The steps that are reported: all but the first that was traced, which began on an idle device.

    steps: the host's ranges; windows: (start, end) of each on the device, one after the other without gaps between.
    units: everything that ran in them.
    """

    steps: list[HostEvent]
    windows: list[tuple[float, float]]
    units: list[Unit]
    on_gpu: bool


class Places:
    """Places of host events, each worked out once."""

    def __init__(self) -> None:
        self._known: dict[int, Surroundings] = {}

    def around(self, event: HostEvent | None) -> Surroundings | None:
        """What surrounds the event."""
        if event is None:
            return None
        if id(event) not in self._known:
            self._known[id(event)] = surroundings(event)
        return self._known[id(event)]

    def of_operator(self, event: HostEvent) -> Place:
        """The place of what the host does in `event` itself."""
        return place(self.around(event), owner_of_operator(event, self.around(event)))


def traced(events: Events, on_gpu: bool, places: Places) -> Traced:
    """The units of all steps but the first. Raises ValueError for a trace without two steps."""
    steps = [event for event in events.host if event.kind == "user_annotation" and event.name == STEP]
    if len(steps) < 2:
        raise ValueError(f"the profile must hold at least 2 steps, it has {len(steps)}")
    units = _kernels(events, steps, places) if on_gpu else _operators(events, steps, places)
    windows = _windows(units, steps) if on_gpu else [(step.start, step.end) for step in steps[1:]]
    kept = [unit for unit in units if unit.step > 0]
    for unit in kept:
        unit.step -= 1
    return Traced(steps[1:], windows, kept, on_gpu)


def _kernels(events: Events, steps: list[HostEvent], places: Places) -> list[Unit]:
    units = []
    for event in events.device:
        # without a launch, a kernel is taken to belong to the step in which it ran
        step = _step_at(event.launch.start if event.launch else event.start, steps)
        owner = owner_of_kernel(event.name, event.launch)
        where = place(places.around(event.launch), owner)
        units.append(
            Unit(
                event.name, owner, event.stream, event.start, event.duration, event.duration, event.launch, where, step
            )
        )
    return [unit for unit in units if unit.step >= 0]


def _operators(events: Events, steps: list[HostEvent], places: Places) -> list[Unit]:
    units = []
    for event in events.host:
        if event.kind == "cpu_op" and event.self_us > 0:
            step = _step_at(event.start, steps)
            if step >= 0 and event.start < steps[step].end:
                owner = owner_of_operator(event, places.around(event))
                where = places.of_operator(event)
                units.append(
                    Unit(
                        event.name, owner, event.thread, event.start, event.duration, event.self_us, event, where, step
                    )
                )
    return units


def _step_at(time: float, steps: list[HostEvent]) -> int:
    """The last step that had begun, -1 before the first."""
    return bisect_right([step.start for step in steps], time) - 1


def _windows(units: list[Unit], steps: list[HostEvent]) -> list[tuple[float, float]]:
    """The device's time of every step but the first: from its first kernel to the next step's."""
    starts = [min((u.start for u in units if u.step == number), default=None) for number in range(len(steps))]
    missing = [number for number, start in enumerate(starts) if start is None]
    if missing:
        raise ValueError(f"the profile shows no kernel for the traced steps {missing}")
    ends = [*starts[1:], max(unit.end for unit in units)]
    return list(zip(starts, ends, strict=True))[1:]


def covered(spans: list[tuple[float, float]], window: tuple[float, float]) -> tuple[float, list[tuple[float, float]]]:
    """How much of a window the spans cover, and the gaps that they leave, in time's order."""
    total, at, gaps = 0.0, window[0], []
    for start, end in sorted(spans):
        start, end = max(start, at), min(end, window[1])
        if end <= at:
            continue
        if start > at:
            gaps.append((at, start))
        total += end - start
        at = end
    if at < window[1]:
        gaps.append((at, window[1]))
    return total, gaps
