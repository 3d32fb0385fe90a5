"""moe for Hopper (sm_90): what it covers, and the order of its kernels. README.md has the schedule."""

from __future__ import annotations

import torch

from tilestack.kernels import launch
from tilestack.kernels.dispatch import Call
from tilestack.kernels.moe import triton_portable
from tilestack.kernels.moe.sm90_activation import activation_backward
from tilestack.kernels.moe.sm90_layout import Layout, max_rows, table_length
from tilestack.kernels.moe.sm90_rows import multiply, up
from tilestack.kernels.moe.sm90_weights import outer
from tilestack.kernels.moe.triton_portable import combine

AUXILIARY = ("pre_activation", "layout")
SAVED = ("x", "gate_up", "down", "topk_ids", "topk_weights", "gate_up_grad", "down_grad", *AUXILIARY)


def refuses(call: Call) -> str | None:
    experts, hidden, intermediate = call.shape("down")
    routes = torch.Size(call.shape("topk_ids")).numel()
    if call.dtype("x") not in (torch.bfloat16, torch.float16):
        return f"is for bfloat16 and float16, got {call.dtype('x')}"
    if hidden % 64 or intermediate % 64:
        return f"is for H and I that are multiples of 64, got H = {hidden}, I = {intermediate}"
    if experts * max(hidden, 2 * intermediate) >= 2**31 or 3 * (routes + 64 * experts) >= 2**31:
        return f"counts rows in 32 bits, got T * K = {routes}, E = {experts}"
    if max(hidden, 2 * intermediate) >= 2**22:
        return f"counts a tile's columns in 14 bits, got H = {hidden}, I = {intermediate}"
    return triton_portable.refuses(call)


def fake_auxiliary(x, gate_up, down, topk_ids, topk_weights, gate_up_grad, down_grad, params):
    routes, experts = topk_ids.shape[0] * topk_ids.shape[1], down.shape[0]
    most = params.bound(routes)
    table = x.new_empty((table_length(routes, experts, most),), dtype=torch.int32)
    return x.new_empty((max_rows(most, experts) if params.keep else 0, gate_up.shape[1])), table


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy of it, as TMA and 16-byte copies want it: whole rows, each at a multiple of 32 bytes."""
    rows = launch.rows(tensor) if tensor.dim() == 2 else tensor.contiguous()
    return rows.clone(memory_format=torch.contiguous_format) if rows.data_ptr() % 16 or rows.stride(0) % 16 else rows


@launch.together
def forward(x, gate_up, down, topk_ids, topk_weights, gate_up_grad, down_grad, params):
    layout, top_k = Layout.of(topk_ids, down.shape[0], params.bound(topk_ids.numel())), topk_ids.shape[1]
    if topk_ids.numel() == 0:
        return x.new_empty(x.shape), x.new_empty((0, gate_up.shape[1])), layout.table
    pre_activation, activated = up(_aligned(x), _aligned(gate_up), layout, top_k, pre=params.keep)
    answers = multiply(activated, _aligned(down), layout, transposed=True)
    return combine(answers, topk_weights, layout.route_to_row, top_k), pre_activation, layout.table


@launch.together
def backward(
    dout, x, gate_up, down, topk_ids, topk_weights, gate_up_grad, down_grad, pre_activation, table, *, needs, params
):
    named = {"x": x, "gate_up": gate_up, "down": down, "topk_weights": topk_weights}
    if topk_ids.numel() == 0:
        return tuple(torch.zeros_like(named[name], memory_format=torch.contiguous_format) for name in needs)
    totals = {"gate_up": gate_up_grad, "down": down_grad}
    wanted = {*needs, *(name for name, total in totals.items() if total is not None)}
    routes, top_k = topk_ids.numel(), topk_ids.shape[1]
    layout = Layout(table, routes, down.shape[0], params.bound(routes))
    weights = None if topk_weights is None else topk_weights.contiguous()
    x, dout, gate_up = _aligned(x), _aligned(dout), _aligned(gate_up)
    if not pre_activation.shape[0]:
        pre_activation, _ = up(x, gate_up, layout, top_k, activate=False)
    dpre_activation, weighted, dweights = activation_backward(
        dout, _aligned(down), pre_activation, weights, layout, top_k, wanted
    )
    found = {"topk_weights": dweights}
    if "down" in wanted:
        found["down"], _ = outer(dout, weighted, layout, top_k, gather="a", total=down_grad)
    del weighted
    answers = multiply(dpre_activation, gate_up, layout, transposed=False) if "x" in needs else None
    if "gate_up" in wanted:  # the sum over a token's rows is made beside this product
        found["gate_up"], found["x"] = outer(
            dpre_activation, x, layout, top_k, gather="b", answers=answers, total=gate_up_grad
        )
    elif "x" in needs:
        found["x"] = combine(answers, None, layout.route_to_row, top_k)
    return tuple(found[name] for name in needs)
