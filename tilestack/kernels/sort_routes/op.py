"""Sorts the routes of a mixture of experts by expert: the contract.

A route is one (token, k) pair, numbered t * K + k. The sorted order keeps the routes of one expert together and, within
an expert, in the order of their numbers, so that grouped products read rows of one weight after the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from tilestack.kernels import checks
from tilestack.kernels.dispatch import Op, portable, reference
from tilestack.kernels.registration import Contract

ID_DTYPES = (torch.int32, torch.int64)


class Routes(NamedTuple):
    """expert_offsets [E + 1], sorted_to_route [T * K] and route_to_sorted [T * K], all int32."""

    expert_offsets: torch.Tensor
    sorted_to_route: torch.Tensor
    route_to_sorted: torch.Tensor


@dataclass(frozen=True)
class SortRoutesParams:
    num_experts: int


def _fake(topk_ids: torch.Tensor, params: SortRoutesParams) -> tuple:
    routes = topk_ids.shape[0] * topk_ids.shape[1]
    return tuple(topk_ids.new_empty((n,), dtype=torch.int32) for n in (params.num_experts + 1, routes, routes))


CONTRACT = Contract("sort_routes", ("topk_ids",), Routes._fields, SortRoutesParams, _fake, constants=Routes._fields)
OP = Op(CONTRACT, (portable("sort_routes"), reference("sort_routes")))


def check_ids(op: str, topk_ids: torch.Tensor) -> None:
    """Raises ValueError if `topk_ids` is not [T, K] of int32 or int64, or has more routes than 32 bits count."""
    checks.rank(op, "topk_ids", topk_ids, (2,), "[T, K]")
    if topk_ids.dtype not in ID_DTYPES:
        raise ValueError(f"{op}: topk_ids must be int32 or int64, got {topk_ids.dtype}; convert it with .int()")
    if topk_ids.numel() >= 2**31 - 2**16:  # room for a block beyond the end
        raise ValueError(f"{op}: topk_ids must have fewer than 2^31 - 2^16 routes, got {topk_ids.numel()}; split it")


def sort_routes(topk_ids: torch.Tensor, num_experts: int, *, implementation: str | None = None) -> Routes:
    """Sort the routes by expert, on the device, without synchronisation. Stable, so deterministic.

    topk_ids: [T, K], int32 or int64. An id outside [0, num_experts) belongs to no expert (another rank's).
    num_experts: E.
    implementation: "tilestack-triton" or "reference"; None chooses.

    Returns Routes, int32: expert e owns the sorted positions expert_offsets[e] to expert_offsets[e + 1];
    sorted_to_route[p] is the route at position p, -1 from expert_offsets[E] on; route_to_sorted[r] is the position of
    route r, -1 where it has none. Nothing is differentiable.
    Raises ValueError for wrong shapes or dtypes.
    """
    check_ids("sort_routes", topk_ids)
    checks.at_least("sort_routes", "num_experts", num_experts, 1)
    return Routes(*OP((topk_ids,), SortRoutesParams(num_experts), implementation))
