"""The arithmetic and the traffic that an op cannot avoid, from shapes alone: what a measured time is held against.

Floating-point operations are those of the mathematics, nothing that an implementation computes again. Bytes are every
input read once and every output written once. A product counts 2 m n k, causal attention the pairs that are seen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Work:
    """Floating-point operations and bytes of one call, forward and backward (0 where an op has no backward)."""

    forward_flops: float
    forward_bytes: float
    backward_flops: float = 0.0
    backward_bytes: float = 0.0


@dataclass(frozen=True)
class Tensors:
    """The tensor arguments of a call: shape and bytes of an element by name; an absent one is not there.

    pairs: query and key pairs that attention sees, over the batch, for one head; None: those of the shapes, causal.
    routes: of moe, to experts that are here (its most_routes, where other ranks sent the rows); None: all of topk_ids.
    """

    shapes: Mapping[str, Shape]
    sizes: Mapping[str, int]
    pairs: float | None = None
    routes: int | None = None

    def bytes(self, *names: str) -> int:
        """Bytes of these arguments together, as far as they are there."""
        return sum(prod(self.shapes[name]) * self.sizes[name] for name in names if name in self.shapes)


def work(op: str, tensors: Tensors) -> Work | None:
    """What one call of the op must do; None for an op that is not in the table."""
    return _FORMULAS[op](tensors) if op in _FORMULAS else None


def _rms_norm(t: Tensors) -> Work:
    x = t.bytes("x")
    streams = 2 if "residual" in t.shapes else 1
    # forward: x (and residual) in, out (and the sum) out; backward: the sum, dout (and its own gradient) in, dx out
    return Work(0, 2 * streams * x + t.bytes("weight"), 0, (2 + streams) * x + 2 * t.bytes("weight"))


def _swiglu(t: Tensors) -> Work:
    one = t.bytes("gate")
    return Work(0, 3 * one, 0, 5 * one)


def _qk_norm_rope(t: Tensors) -> Work:
    heads, tables = t.bytes("q", "k"), t.bytes("cos", "sin")
    return Work(0, 2 * heads + tables, 0, 3 * heads + tables)


def _attention(t: Tensors) -> Work:
    heads, width = t.shapes["q"][-2:]
    pairs = t.pairs
    if pairs is None:
        batch = t.shapes["q"][0] if len(t.shapes["q"]) == 4 else 1
        pairs = batch * t.shapes["q"][-3] * t.shapes["k"][-3] / 2
    product = 2.0 * heads * width * pairs
    q, kv = t.bytes("q"), t.bytes("k", "v")
    return Work(2 * product, 2 * q + kv, 5 * product, 4 * q + 2 * kv)


def _router(t: Tensors) -> Work:
    logits = t.bytes("logits")
    return Work(0, logits, 0, 2 * logits)


def _sort_routes(t: Tensors) -> Work:
    return Work(0, 3 * t.bytes("topk_ids"))


def _moe(t: Tensors) -> Work:
    routes = prod(t.shapes["topk_ids"]) if t.routes is None else min(t.routes, prod(t.shapes["topk_ids"]))
    width, hidden = t.shapes["down"][-1], t.shapes["x"][-1]
    product = 2.0 * routes * hidden * width
    weights, x = t.bytes("gate_up", "down"), t.bytes("x")
    kept = 2 * routes * width * t.sizes["x"]  # gate and up of every route, which backward reads
    return Work(3 * product, weights + 2 * x + kept, 6 * product, 2 * weights + 3 * x + kept)


def _linear_cross_entropy(t: Tensors) -> Work:
    product = 2.0 * prod(t.shapes["hidden"]) * t.shapes["weight"][0]
    hidden, weight = t.bytes("hidden"), t.bytes("weight")
    return Work(product, hidden + weight, 2 * product, 2 * (hidden + weight))


def _adamw(t: Tensors) -> Work:
    scales = [name for name in ("exp_avg_scale", "exp_avg_sq_scale") if name in t.shapes]
    written = ("exp_avg", "exp_avg_sq", *scales, "master" if "master" in t.shapes else "param")
    narrow = t.bytes("param") if "master" in t.shapes else 0  # only written: the master is what is read
    return Work(0, t.bytes("grad") + 2 * t.bytes(*written) + narrow)


_FORMULAS: dict[str, Callable[[Tensors], Work]] = {
    "rms_norm": _rms_norm,
    "swiglu": _swiglu,
    "qk_norm_rope": _qk_norm_rope,
    "attention": _attention,
    "router": _router,
    "sort_routes": _sort_routes,
    "moe": _moe,
    "linear_cross_entropy": _linear_cross_entropy,
    "adamw": _adamw,
}
