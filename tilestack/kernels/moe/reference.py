"""moe in plain torch: the definition. A loop over the experts that have tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812

from tilestack.kernels.dispatch import Call
from tilestack.kernels.reference_autograd import gradients

AUXILIARY = ()
SAVED = ("x", "gate_up", "down", "topk_ids", "topk_weights", "gate_up_grad", "down_grad")


def refuses(call: Call) -> str | None:
    return None


def compute(x, gate_up, down, topk_ids, topk_weights, params) -> tuple[torch.Tensor, ...]:
    experts, top_k = down.shape[0], topk_ids.shape[1]
    ids = topk_ids.reshape(-1)
    ids = torch.where((ids >= 0) & (ids < experts), ids, experts)  # no expert's: sorted behind all
    counts = torch.bincount(ids, minlength=experts + 1)[:experts].tolist()
    routes = ids.sort(stable=True).indices[: sum(counts)]
    tokens = routes // top_k
    answers = []
    # unbind, not gate_up[e]: the gradient of an index is a zero tensor of the full size for every expert
    for e, (rows, w_up, w_down) in enumerate(
        zip(x.index_select(0, tokens).split(counts), gate_up.unbind(), down.unbind(), strict=True)
    ):
        if counts[e] or e == 0:  # expert 0 always, so that the result depends on every input
            gate, up = F.linear(rows, w_up).chunk(2, -1)
            answers.append(F.linear(F.silu(gate) * up, w_down))
    wide = torch.promote_types(x.dtype, torch.float32)
    answer = torch.cat(answers).to(wide)
    if topk_weights is not None:
        answer = answer * topk_weights.reshape(-1)[routes, None]
    return (x.new_zeros(x.shape, dtype=wide).index_add(0, tokens, answer).to(x.dtype),)


def forward(x, gate_up, down, topk_ids, topk_weights, gate_up_grad, down_grad, params):
    return compute(x, gate_up, down, topk_ids, topk_weights, params)


def backward(dout, x, gate_up, down, topk_ids, topk_weights, gate_up_grad, down_grad, *, needs, params):
    named = {"x": x, "gate_up": gate_up, "down": down, "topk_ids": topk_ids, "topk_weights": topk_weights}
    totals = {name: total for name, total in (("gate_up", gate_up_grad), ("down", down_grad)) if total is not None}
    wanted = tuple(name for name in named if name in needs or name in totals)
    found = dict(zip(wanted, gradients(compute, named, (dout,), wanted, params), strict=True))
    for name, total in totals.items():
        total += found[name]
    return tuple(found[name] for name in needs)
