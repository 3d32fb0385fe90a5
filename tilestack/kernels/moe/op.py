"""The experts of a mixture of experts (SwiGLU), for tokens that a router has sent to them: the contract.

    gate, up = gate_up[e] @ x[t]                          the first I rows of gate_up[e] are the gate's
    out[t] = sum over k of topk_weights[t, k] * down[e] @ (silu(gate) * up),       e = topk_ids[t, k]

Source: Shazeer, "GLU Variants Improve Transformer" (2020), for the expert; Shazeer et al., "Outrageously Large Neural
Networks" (2017), eq. 1, for the sum. Weights and sum are float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tilestack.kernels import checks
from tilestack.kernels.dispatch import Implementation, Op, portable, reference
from tilestack.kernels.registration import Contract
from tilestack.kernels.sort_routes.op import check_ids


@dataclass(frozen=True)
class MoEParams:
    """keep: the forward keeps the pre-activation for the backward, which otherwise makes it again.

    most_routes: a bound on the routes to experts that are here; -1: all may be.
    """

    keep: bool
    most_routes: int = -1

    def bound(self, routes: int) -> int:
        """How many of so many routes may be to experts that are here."""
        return routes if self.most_routes < 0 else min(routes, self.most_routes)


def _fake(x: torch.Tensor, *_) -> tuple:
    return (x.new_empty(x.shape),)


CONTRACT = Contract(
    "moe",
    ("x", "gate_up", "down", "topk_ids", "topk_weights?", "gate_up_grad?", "down_grad?"),
    ("out",),
    MoEParams,
    _fake,
)
HOPPER = Implementation(
    "tilestack",
    "tilestack.kernels.moe.sm90_gluon",
    "sm90",
    min_capability=90,
    max_capability=90,
    packages=("triton",),
)
OP = Op(CONTRACT, (HOPPER, portable("moe"), reference("moe")))


def moe(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor | None = None,
    *,
    recompute: bool = False,
    most_routes: int | None = None,
    gate_up_grad: torch.Tensor | None = None,
    down_grad: torch.Tensor | None = None,
    implementation: str | None = None,
) -> torch.Tensor:
    """Send every token through its experts and sum what they answer.

    x: [T, H], floating point.
    gate_up: [E, 2I, H], the dtype of x; the gate's rows first.
    down: [E, H, I], the dtype of x.
    topk_ids: [T, K], int32 or int64. An id outside [0, E) is another rank's expert: it is skipped and adds 0. The
        same expert twice for one token counts twice.
    topk_weights: [T, K], float32 (float64 with float64 x); None means 1, which with K = 1 serves rows that other ranks
        dispatched.
    recompute: keep nothing but the inputs for the backward, and make the pre-activation there again: 4 * K * I bytes a
        token less in 16 bits, for 4 of 18 * K * H * I operations more.
    most_routes: at most so many ids lie in [0, E), where the caller knows: memory and grids are of this size instead of
        T * K. A promise: on a CPU it is checked, on a GPU, where looking would wait, more routes are written outside.
    gate_up_grad, down_grad: like the weights, contiguous, float32 or the weights' dtype. The backward adds the weight's
        gradient to it, in one pass, and autograd gets none: for weights whose gradient nobody hooks (DeepSpeed does).
        Without effect where the weight needs no gradient; else x or topk_weights must require one.
    implementation: "tilestack", "tilestack-triton" or "reference"; None chooses.

    Returns out like x. Differentiable in x, gate_up, down and topk_weights. The same input gives the same bits.
    Raises ValueError for wrong shapes, dtypes, strides or devices, on a CPU for a bound that is too low, and for a sum
    that no backward would write or under torch.compile.
    """
    checks.floating("moe", x=x, gate_up=gate_up, down=down)
    checks.same_dtype("moe", x=x, gate_up=gate_up, down=down)
    checks.same_device("moe", x=x, gate_up=gate_up, down=down, topk_ids=topk_ids, topk_weights=topk_weights)
    checks.rank("moe", "x", x, (2,), "[T, H]")
    checks.rank("moe", "down", down, (3,), "[E, H, I]")
    tokens, hidden = x.shape
    experts, _, intermediate = down.shape
    checks.at_least("moe", "the E of down [E, H, I]", experts, 1)
    checks.shape("moe", "down", down, (experts, hidden, intermediate), "[E, H, I], H the width of x")
    checks.shape("moe", "gate_up", gate_up, (experts, 2 * intermediate, hidden), "[E, 2I, H], E and I from down")
    check_ids("moe", topk_ids)
    top_k = topk_ids.shape[1]
    checks.shape("moe", "topk_ids", topk_ids, (tokens, top_k), "[T, K], T the rows of x")
    checks.at_least("moe", "the K of topk_ids [T, K]", top_k, 1)
    if topk_weights is not None:
        checks.dtype("moe", "topk_weights", topk_weights, torch.promote_types(x.dtype, torch.float32))
        checks.shape("moe", "topk_weights", topk_weights, (tokens, top_k), "[T, K], like topk_ids")
    if most_routes is not None:
        _check_bound(topk_ids, experts, most_routes)
    leaves = (x, gate_up, down, topk_weights)
    needs_grad = torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in leaves)
    gate_up, gate_up_grad = _accumulating("gate_up", gate_up, gate_up_grad)
    down, down_grad = _accumulating("down", down, down_grad)
    if (gate_up_grad is not None or down_grad is not None) and not (x.requires_grad or _requires_grad(topk_weights)):
        raise ValueError(
            "moe: gate_up_grad and down_grad are written by the backward, which runs only if x or topk_weights "
            "requires a gradient; neither does: leave them out"
        )
    tensors = (x, gate_up, down, topk_ids, topk_weights, gate_up_grad, down_grad)
    bound = -1 if most_routes is None else max(1, most_routes)
    return OP(tensors, MoEParams(keep=needs_grad and not recompute, most_routes=bound), implementation)[0]


def _check_bound(topk_ids: torch.Tensor, experts: int, most_routes: int) -> None:
    checks.at_least("moe", "most_routes", most_routes, 0)
    if topk_ids.device.type == "cpu":
        found = int(((topk_ids >= 0) & (topk_ids < experts)).sum())
        if found > most_routes:
            raise ValueError(f"moe: most_routes must be at least {found}, the ids in [0, {experts}), got {most_routes}")


def _requires_grad(tensor: torch.Tensor | None) -> bool:
    return tensor is not None and tensor.requires_grad


def _accumulating(
    name: str, weight: torch.Tensor, total: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The weight, out of autograd's sight where its gradient is added to `total`, and `total` if it is to be used."""
    if total is None:
        return weight, None
    if torch.compiler.is_compiling():
        raise ValueError(f"moe: {name}_grad is written behind autograd's back, which torch.compile cannot trace")
    checks.tensors("moe", **{f"{name}_grad": total})
    checks.same_device("moe", **{name: weight, f"{name}_grad": total})
    checks.shape("moe", f"{name}_grad", total, tuple(weight.shape), f"like {name}")
    if total.dtype not in (torch.float32, weight.dtype):
        raise ValueError(f"moe: {name}_grad must be torch.float32 or the dtype of {name}, got {total.dtype}")
    if not total.is_contiguous():
        raise ValueError(f"moe: {name}_grad must be contiguous, got the strides {list(total.stride())}")
    if not (torch.is_grad_enabled() and weight.requires_grad):
        return weight, None
    return weight.detach(), total
