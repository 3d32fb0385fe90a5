"""How much arithmetic and traffic the calls of a trace had to do, from the shapes that the profiler recorded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from math import prod

from tilestack.app.trace.attribution import BACKWARD, Surroundings
from tilestack.app.trace.events import HostEvent
from tilestack.kernels import ops
from tilestack.kernels.work import Tensors, Work, work

_SIZES = {
    "c10::BFloat16": 2, "c10::Half": 2, "float": 4, "double": 8, "int": 4, "long int": 8, "long": 8, "bool": 1,
    "unsigned char": 1, "signed char": 1,
}  # fmt: skip


class Rates:
    """Looks up the work of operators; learns that of a backward op from its forward calls, which have the shapes.

    pairs: query and key pairs that attention sees in one micro-batch, for one head.
    """

    def __init__(self, host: list[HostEvent], pairs: float):
        self._pairs = pairs
        calls: dict[str, list[Work]] = {}
        for event in host:
            name = event.name.removeprefix("tilestack::")
            known = next((op for op in ops() if name.startswith(f"{op}_forward_")), None)
            if known and event.name.startswith("tilestack::"):
                found = self._forward_work(known, event)
                if found is not None:
                    calls.setdefault(known, []).append(found)
        self._backward = {
            op: (
                sum(each.backward_flops for each in found) / len(found),
                sum(each.backward_bytes for each in found) / len(found),
            )
            for op, found in calls.items()
        }

    def of(self, event: HostEvent | None, around: Surroundings | None) -> tuple[HostEvent, float, float] | None:
        """(the operator whose work it is, floating-point operations, bytes) of what runs inside `event`."""
        if event is None or around is None:
            return None
        if around.op is not None:
            call = next((each for each in event.chain() if each.name.startswith("tilestack::")), None)
            found = self._of_op(around.op[0], around.op[1], call) if call is not None else None
            return None if found is None else (call, *found)
        for each in event.chain():
            if each.kind == "cpu_op" and each.name in _PRODUCTS:
                try:
                    return each, *_PRODUCTS[each.name](each)
                except (IndexError, TypeError):
                    return None  # a profile without shapes
            if each.kind == "cpu_op" and each.name.startswith("aten::_scaled_dot_product_"):
                return self._sdpa(each)
        return None

    def _of_op(self, op: str, direction: str, call: HostEvent) -> tuple[float, float] | None:
        if direction == BACKWARD:
            return self._backward.get(op)
        found = self._forward_work(op, call)
        return None if found is None else (found.forward_flops, found.forward_bytes)

    def _forward_work(self, op: str, call: HostEvent) -> Work | None:
        shapes, types = call.arguments.get("Input Dims"), call.arguments.get("Input type")
        if op not in ops() or not shapes or not types:
            return None
        given = {
            name: (tuple(shape), _SIZES[kind])
            for name, shape, kind in zip(ops()[op].contract.input_names, shapes, types, strict=False)
            if kind in _SIZES
        }
        tensors = Tensors(
            {name: shape for name, (shape, _) in given.items()}, {name: size for name, (_, size) in given.items()},
            self._pairs if op == "attention" else None, _routes_here(op, call),
        )  # fmt: skip
        try:
            return work(op, tensors)
        except (KeyError, IndexError):
            return None

    def _sdpa(self, call: HostEvent) -> tuple[HostEvent, float, float] | None:
        shapes, types = call.arguments.get("Input Dims"), call.arguments.get("Input type")
        if not shapes or not types:
            return None
        backward = call.name.endswith("_backward")
        q, k, v = shapes[1:4] if backward else shapes[:3]
        size = _SIZES.get(types[1], 0)
        product = 2.0 * q[1] * q[3] * self._pairs  # [B, heads, S, D]
        traffic = size * (2 * prod(q) + prod(k) + prod(v))
        return (call, 5 * product, 2 * traffic) if backward else (call, 2 * product, traffic)


def _routes_here(op: str, call: HostEvent) -> int | None:
    """moe's bound on the routes to this rank's experts; None for another op, or where all may be."""
    if op != "moe":
        return None
    contract = ops()[op].contract
    names = [*contract.input_names, *(field.name for field in fields(contract.params))]
    scalars = dict(zip(names, call.arguments.get("Concrete Inputs", ()), strict=False))
    found = int(scalars.get("most_routes") or -1)
    return None if found < 0 else found


def _product(event: HostEvent, a: list[int], b: list[int], at: int) -> tuple[float, float]:
    """A product of matrices, of a batch of them, or of groups of rows: [M, K] by [E, K, N] is one of the groups."""
    grouped_by_rows = len(a) == 2 and len(b) == 3
    flops = 2.0 * prod(a) * b[-1]
    out = a[-2] * b[-1] * (1 if grouped_by_rows or len(a) == 2 else prod(a[:-2]))
    return flops, float((prod(a) + prod(b) + out) * _SIZES.get(event.arguments["Input type"][at], 0))


def _of_arguments(first: int) -> Callable[[HostEvent], tuple[float, float]]:
    def found(event: HostEvent) -> tuple[float, float]:
        shapes = event.arguments["Input Dims"]
        return _product(event, shapes[first], shapes[first + 1], first)

    return found


_PRODUCTS: dict[str, Callable[[HostEvent], tuple[float, float]]] = {
    "aten::mm": _of_arguments(0),
    "aten::bmm": _of_arguments(0),
    "aten::_grouped_mm": _of_arguments(0),
    "aten::addmm": _of_arguments(1),
    "aten::baddbmm": _of_arguments(1),
}
