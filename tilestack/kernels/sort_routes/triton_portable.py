"""sort_routes in Triton: a counting sort in three launches, without atomics and without a look from the host.

1. Each program counts the experts of its own block of routes.
2. Programs of a few experts each turn the counts into what came before: over the blocks.
3. Each program places its block: a route's position is the start of its expert, plus that expert's routes in earlier
   blocks, plus its rank in the block, found by comparing every two routes of it.

An expert's positions may begin at multiples of more than 1 (ALIGN), for kernels that own whole blocks of rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tilestack.kernels import launch
from tilestack.kernels.dispatch import Call
from tilestack.kernels.sort_routes.configs import (
    BLOCK_ROUTES,
    MAX_EXPERTS,
    SCAN_BLOCKS,
    SCAN_EXPERTS,
    SCAN_WARPS,
    WARPS,
    chunk,
)

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
    counts_ptr, n_blocks, EXPERTS: tl.constexpr, SCAN_EXPERTS: tl.constexpr, SCAN_BLOCKS: tl.constexpr
):
    # counts[block, e] becomes the number of routes of expert e in earlier blocks; one more row: in all of them
    experts = tl.program_id(0) * SCAN_EXPERTS + tl.arange(0, SCAN_EXPERTS)
    before = tl.zeros([SCAN_EXPERTS], tl.int32)
    for start in range(0, n_blocks, SCAN_BLOCKS):
        blocks = start + tl.arange(0, SCAN_BLOCKS)
        inside = (blocks < n_blocks)[:, None]
        ptrs = counts_ptr + blocks[:, None] * EXPERTS + experts[None, :]
        counts = tl.load(ptrs, mask=inside, other=0)
        tl.store(ptrs, tl.cumsum(counts, 0) - counts + before[None, :], mask=inside)
        before += tl.sum(counts, 0)
    tl.store(counts_ptr + n_blocks * EXPERTS + experts, before)


@triton.jit
def place_routes(
    ids_ptr, before_ptr, expert_offsets_ptr, sorted_to_route_ptr, route_to_sorted_ptr, n_routes, n_sorted, n_blocks, E,
    EXPERTS: tl.constexpr, BLOCK: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Places this program's block, if there is one; returns where each expert's positions begin, and how many it has,
    those that only fill up to a multiple of ALIGN included."""
    block = tl.program_id(0)
    experts = tl.arange(0, EXPERTS)
    sizes = tl.load(before_ptr + n_blocks * EXPERTS + experts)
    aligned = (sizes + (ALIGN - 1)) // ALIGN * ALIGN
    ends = tl.cumsum(aligned, 0)
    starts = ends - aligned
    if block == 0:
        tl.store(expert_offsets_ptr + experts, starts, mask=experts < E)
        tl.store(expert_offsets_ptr + experts + 1, ends, mask=experts == E - 1)

    if block < n_blocks:
        first = starts + tl.load(before_ptr + block * EXPERTS + experts)
        index = tl.arange(0, BLOCK)
        routes = block * BLOCK + index
        chosen = _load_experts(ids_ptr, routes, n_routes, E)
        has_expert = chosen >= 0
        is_earlier = (chosen[:, None] == chosen[None, :]) & (index[:, None] < index[None, :])
        rank = tl.sum(is_earlier.to(tl.int32), 0)
        positions = tl.gather(first, tl.maximum(chosen, 0), 0) + rank
        tl.store(route_to_sorted_ptr + routes, tl.where(has_expert, positions, -1), mask=routes < n_routes)
        tl.store(sorted_to_route_ptr + positions, routes, mask=has_expert)

    # what is nobody's: behind the last expert and, with ALIGN, behind each expert's last route
    n_placed = tl.sum(aligned, 0)
    for start in range(n_placed + block * BLOCK, n_sorted, tl.num_programs(0) * BLOCK):
        positions = start + tl.arange(0, BLOCK)
        tl.store(sorted_to_route_ptr + positions, -1, mask=positions < n_sorted)
    if ALIGN > 1:
        for expert in range(block, E, tl.num_programs(0)):
            begin = tl.sum(tl.where(experts == expert, starts + sizes, 0), 0)
            end = tl.sum(tl.where(experts == expert, ends, 0), 0)
            positions = begin + tl.arange(0, ALIGN)
            tl.store(sorted_to_route_ptr + positions, -1, mask=positions < end)
    return starts, aligned


@triton.jit
def sort_routes_place_kernel(
    ids_ptr, before_ptr, expert_offsets_ptr, sorted_to_route_ptr, route_to_sorted_ptr, n_routes, n_blocks, E,
    EXPERTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    place_routes(
        ids_ptr, before_ptr, expert_offsets_ptr, sorted_to_route_ptr, route_to_sorted_ptr, n_routes, n_routes,
        n_blocks, E, EXPERTS, BLOCK, 1,
    )  # fmt: skip


def counts_before(ids: torch.Tensor, experts: int) -> torch.Tensor:
    """[blocks of BLOCK_ROUTES + 1, width]: how many routes of each expert came before each block; the last row: in all.

    ids: contiguous. The width is the number of experts, rounded up to a power of two. Two launches.
    """
    n_routes, width = ids.numel(), launch.next_power_of_2(experts)
    n_blocks = launch.cdiv(n_routes, BLOCK_ROUTES)
    counts = ids.new_empty((n_blocks + 1, width), dtype=torch.int32)
    scanned = min(SCAN_EXPERTS, width)
    with launch.on_device(ids):
        if n_routes:
            launch.run(
                sort_routes_count_kernel, (n_blocks,),
                ids, counts, n_routes, experts, EXPERTS=width, BLOCK=BLOCK_ROUTES, CHUNK=chunk(width), num_warps=WARPS,
            )  # fmt: skip
        launch.run(
            sort_routes_scan_kernel, (width // scanned,),
            counts, n_blocks, EXPERTS=width, SCAN_EXPERTS=scanned, SCAN_BLOCKS=SCAN_BLOCKS, num_warps=SCAN_WARPS,
        )  # fmt: skip
    return counts


@launch.together
def forward(topk_ids: torch.Tensor, params) -> tuple[torch.Tensor, ...]:
    ids = topk_ids.contiguous()
    n_routes, experts = ids.numel(), params.num_experts
    before = counts_before(ids, experts)
    expert_offsets, sorted_to_route, route_to_sorted = (
        ids.new_empty((size,), dtype=torch.int32) for size in (experts + 1, n_routes, n_routes)
    )
    n_blocks = before.shape[0] - 1
    with launch.on_device(ids):
        launch.run(
            sort_routes_place_kernel, (max(n_blocks, 1),),
            ids, before, expert_offsets, sorted_to_route, route_to_sorted, n_routes, n_blocks, experts,
            EXPERTS=before.shape[1], BLOCK=BLOCK_ROUTES, num_warps=WARPS,
        )  # fmt: skip
    return expert_offsets, sorted_to_route, route_to_sorted
