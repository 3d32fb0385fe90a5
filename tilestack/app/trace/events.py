"""The profiler's raw trace as ranges on the host, each inside its parent, and what each of them made the device do.

torch's profiler writes Chrome's trace format. What is read of it: complete events ("X") of the host (operators, named
ranges, calls of the CUDA runtime) and of the device (kernels, copies), whose `correlation` names the call that launched
them; and the arrows ("fwdbwd") from an operator of the forward pass to the node of autograd that differentiates it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

BACKWARD_NODE = "autograd::engine::evaluate_function: "
_HOST = {"cpu_op", "user_annotation", "cuda_runtime", "cuda_driver"}
_PROFILER = "ProfilerStep#"  # the profiler's own range around each step
_DEVICE = {"kernel", "gpu_memcpy", "gpu_memset"}


@dataclass(eq=False)
class HostEvent:
    """A range on a thread of the host. Times are in microseconds.

    kind: "cpu_op" (an operator), "user_annotation" (a named range), "cuda_runtime" or "cuda_driver" (a call).
    parent: the range around it on the same thread.
    forward: for a node of autograd, the operator of the forward pass that it differentiates.
    self_us: its duration without its children's.
    """

    name: str
    kind: str
    thread: int
    start: float
    duration: float
    arguments: dict[str, Any] = field(repr=False, default_factory=dict)
    parent: HostEvent | None = field(repr=False, default=None)
    forward: HostEvent | None = field(repr=False, default=None)
    self_us: float = 0.0
    depth: int = 0

    @property
    def end(self) -> float:
        return self.start + self.duration

    def chain(self) -> Iterator[HostEvent]:
        """The event and the ranges around it, from the inside out."""
        event: HostEvent | None = self
        while event is not None:
            yield event
            event = event.parent


@dataclass(eq=False)
class DeviceEvent:
    """A kernel or a copy on the device. launch: the host's call that started it; None where the trace does not say."""

    name: str
    kind: str
    stream: int
    start: float
    duration: float
    launch: HostEvent | None = field(repr=False, default=None)

    @property
    def end(self) -> float:
        return self.start + self.duration


@dataclass(frozen=True)
class Events:
    """A trace: what ran on the host and on the device, each in the order of its start."""

    host: list[HostEvent]
    device: list[DeviceEvent]


def read(trace: dict[str, Any]) -> Events:
    """The events of a trace in Chrome's format."""
    complete = [each for each in trace["traceEvents"] if each.get("ph") == "X"]
    mine = (each for each in complete if each.get("cat") in _HOST and not each["name"].startswith(_PROFILER))
    host = [_host_event(each) for each in mine]
    host.sort(key=lambda event: (event.start, -event.duration))
    _nest(host)
    _link_backward(host, trace["traceEvents"])
    launches = {}
    for event in host:
        if event.kind.startswith("cuda") and "correlation" in event.arguments:
            launches[event.arguments["correlation"]] = event
    device = [
        DeviceEvent(
            each["name"], each["cat"], int(each.get("args", {}).get("stream", each["tid"])), float(each["ts"]),
            float(each["dur"]), launches.get(each.get("args", {}).get("correlation")),
        )
        for each in complete
        if each.get("cat") in _DEVICE
    ]  # fmt: skip
    return Events(host, sorted(device, key=lambda event: event.start))


def _host_event(each: dict[str, Any]) -> HostEvent:
    return HostEvent(
        each["name"], each["cat"], int(each["tid"]), float(each["ts"]), float(each["dur"]), each.get("args", {})
    )


def _nest(host: list[HostEvent]) -> None:
    """Set parent, depth and self time of events that are sorted by start, the longer first."""
    opened: dict[int, list[HostEvent]] = {}
    for event in host:
        stack = opened.setdefault(event.thread, [])
        while stack and stack[-1].end <= event.start:
            stack.pop()
        event.self_us = event.duration
        if stack:
            event.parent, event.depth = stack[-1], len(stack)
            # clocks may let a child end after its parent: what lies outside is not the parent's
            stack[-1].self_us -= min(event.end, stack[-1].end) - event.start
        stack.append(event)
    for event in host:
        event.self_us = max(event.self_us, 0.0)


def _link_backward(host: list[HostEvent], raw: list[dict[str, Any]]) -> None:
    arrows = [each for each in raw if each.get("cat") == "fwdbwd"]
    sources = {each["id"]: (each["tid"], each["ts"]) for each in arrows if each["ph"] == "s"}
    places: dict[tuple[int, float], list[HostEvent]] = {}
    for event in host:
        if event.kind == "cpu_op":
            places.setdefault((event.thread, event.start), []).append(event)
    for each in arrows:
        if each["ph"] == "f" and each["id"] in sources:
            source = places.get(sources[each["id"]])
            for event in places.get((each["tid"], each["ts"]), []):
                event.forward = source[0] if source else None
                if event.parent is not None and event.parent.name.startswith(BACKWARD_NODE):
                    event.parent.forward = event.forward  # what autograd does around the node belongs to it
