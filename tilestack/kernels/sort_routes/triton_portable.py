"""sort_routes in Triton: a counting sort in three launches, without atomics and without a look from the host.

1. Each program counts the experts of its own block of routes.
2. One program turns the counts into what came before: over the blocks for each expert, then over the experts.
3. Each program places its block: a route's position is what came before it plus its rank within the block.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tilestack.kernels import launch
from tilestack.kernels.dispatch import Call
from tilestack.kernels.sort_routes.configs import BLOCK_ROUTES, MAX_EXPERTS, SCAN_BLOCKS, WARPS, chunk

AUXILIARY = ()


def refuses(call: Call) -> str | None:
    if call.params.num_experts > MAX_EXPERTS:
        return f"keeps a count of every expert in registers, up to E = {MAX_EXPERTS}, got {call.params.num_experts}"
    return None


@triton.jit
def _load_experts(ids_ptr, routes, n_routes, E):
    """The expert of each route, -1 where it has none; compared before it is narrowed, so that 64-bit ids are safe."""
    ids = tl.load(ids_ptr + routes, mask=routes < n_routes, other=-1)
    return tl.where((ids >= 0) & (ids < E), ids, -1).to(tl.int32)


@triton.jit
def sort_routes_count_kernel(
    ids_ptr, counts_ptr, n_routes, E, EXPERTS: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr
):
    block = tl.program_id(0)
    experts = tl.arange(0, EXPERTS)
    counts = tl.zeros([EXPERTS], tl.int32)
    for start in range(0, BLOCK, CHUNK):
        routes = block * BLOCK + start + tl.arange(0, CHUNK)
        chosen = _load_experts(ids_ptr, routes, n_routes, E)
        counts += tl.sum((chosen[:, None] == experts[None, :]).to(tl.int32), 0)
    tl.store(counts_ptr + block * EXPERTS + experts, counts)


@triton.jit
def sort_routes_scan_kernel(
    counts_ptr, expert_offsets_ptr, n_blocks, E, EXPERTS: tl.constexpr, SCAN_BLOCKS: tl.constexpr
):
    # counts[block, e] becomes the number of routes of expert e in earlier blocks
    experts = tl.arange(0, EXPERTS)
    before = tl.zeros([EXPERTS], tl.int32)
    for start in range(0, n_blocks, SCAN_BLOCKS):
        blocks = start + tl.arange(0, SCAN_BLOCKS)
        inside = (blocks < n_blocks)[:, None]
        ptrs = counts_ptr + blocks[:, None] * EXPERTS + experts[None, :]
        counts = tl.load(ptrs, mask=inside, other=0)
        tl.store(ptrs, tl.cumsum(counts, 0) - counts + before[None, :], mask=inside)
        before += tl.sum(counts, 0)
    ends = tl.cumsum(before, 0)
    tl.store(expert_offsets_ptr + experts, ends - before, mask=experts < E)
    tl.store(expert_offsets_ptr + experts + 1, ends, mask=experts == E - 1)


@triton.jit
def sort_routes_place_kernel(
    ids_ptr, counts_ptr, expert_offsets_ptr, sorted_to_route_ptr, route_to_sorted_ptr, n_routes, E,
    EXPERTS: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    experts = tl.arange(0, EXPERTS)
    next_position = tl.load(counts_ptr + block * EXPERTS + experts)
    next_position += tl.load(expert_offsets_ptr + experts, mask=experts < E, other=0)
    n_placed = tl.load(expert_offsets_ptr + E)
    for start in range(0, BLOCK, CHUNK):
        routes = block * BLOCK + start + tl.arange(0, CHUNK)
        chosen = _load_experts(ids_ptr, routes, n_routes, E)
        has_expert = chosen >= 0
        one_hot = (chosen[:, None] == experts[None, :]).to(tl.int32)
        positions = tl.sum(one_hot * (next_position[None, :] + tl.cumsum(one_hot, 0) - 1), 1)
        tl.store(route_to_sorted_ptr + routes, tl.where(has_expert, positions, -1), mask=routes < n_routes)
        tl.store(sorted_to_route_ptr + positions, routes, mask=has_expert)
        # positions behind the last expert are nobody's
        tl.store(sorted_to_route_ptr + routes, -1, mask=(routes >= n_placed) & (routes < n_routes))
        next_position += tl.sum(one_hot, 0)


def forward(topk_ids: torch.Tensor, params) -> tuple[torch.Tensor, ...]:
    ids = topk_ids.contiguous()
    n_routes, experts = ids.numel(), params.num_experts
    width = launch.next_power_of_2(experts)
    n_blocks = launch.cdiv(n_routes, BLOCK_ROUTES)

    def empty(*shape):
        return ids.new_empty(shape, dtype=torch.int32)

    counts = empty(n_blocks, width)
    expert_offsets, sorted_to_route, route_to_sorted = empty(experts + 1), empty(n_routes), empty(n_routes)
    tiles = {"EXPERTS": width, "BLOCK": BLOCK_ROUTES, "CHUNK": chunk(width), "num_warps": WARPS}
    with launch.on_device(ids):
        if n_routes:
            sort_routes_count_kernel[(n_blocks,)](ids, counts, n_routes, experts, **tiles)
        sort_routes_scan_kernel[(1,)](
            counts, expert_offsets, n_blocks, experts, EXPERTS=width, SCAN_BLOCKS=SCAN_BLOCKS, num_warps=WARPS
        )
        if n_routes:
            sort_routes_place_kernel[(n_blocks,)](
                ids, counts, expert_offsets, sorted_to_route, route_to_sorted, n_routes, experts, **tiles
            )
    return expert_offsets, sorted_to_route, route_to_sorted
