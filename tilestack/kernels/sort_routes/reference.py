"""sort_routes in plain torch: the definition."""

from __future__ import annotations

import torch

from tilestack.kernels.dispatch import Call

AUXILIARY = ()
SAVED = ()


def refuses(call: Call) -> str | None:
    return None


def forward(topk_ids: torch.Tensor, params) -> tuple[torch.Tensor, ...]:
    experts = params.num_experts
    ids = topk_ids.reshape(-1)
    ids = torch.where((ids >= 0) & (ids < experts), ids, experts)  # no expert's: sorted behind all
    ordered, routes = ids.sort(stable=True)
    expert_offsets = torch.searchsorted(ordered, torch.arange(experts + 1, device=ids.device, dtype=ids.dtype)).int()
    has_expert = ordered < experts
    positions = torch.arange(ids.numel(), device=ids.device)
    route_to_sorted = torch.empty_like(routes)
    route_to_sorted[routes] = torch.where(has_expert, positions, -1)
    return expert_offsets, torch.where(has_expert, routes, -1).int(), route_to_sorted.int()
