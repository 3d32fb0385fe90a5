"""sort_routes in Triton: a counting sort in two launches, without atomics and without a look from the host.

1. Each program counts the experts of its own block of routes.
2. Each program places its block: a route's position is what came before the block, plus its rank in it. The program
   adds up the counts of earlier blocks itself: they are few, and a launch in between would take longer.

An expert's positions may begin at multiples of more than 1 (ALIGN), for kernels that own whole blocks of rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tilestack.kernels import launch
from tilestack.kernels.dispatch import Call
from tilestack.kernels.sort_routes.configs import MAX_EXPERTS, WARPS, block_routes, chunk

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
def sort_routes_place_kernel(
    ids_ptr, counts_ptr, expert_offsets_ptr, sorted_to_route_ptr, route_to_sorted_ptr, n_routes, n_sorted, n_blocks, E,
    EXPERTS: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, SCAN_BLOCKS: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    experts = tl.arange(0, EXPERTS)
    before = tl.zeros([SCAN_BLOCKS, EXPERTS], tl.int32)
    total = tl.zeros([SCAN_BLOCKS, EXPERTS], tl.int32)
    for start in range(0, n_blocks, SCAN_BLOCKS):
        blocks = start + tl.arange(0, SCAN_BLOCKS)
        ptrs = counts_ptr + blocks[:, None] * EXPERTS + experts[None, :]
        counts = tl.load(ptrs, mask=(blocks < n_blocks)[:, None], other=0)
        total += counts
        before += tl.where((blocks < block)[:, None], counts, 0)
    sizes = tl.sum(total, 0)
    aligned = (sizes + (ALIGN - 1)) // ALIGN * ALIGN
    ends = tl.cumsum(aligned, 0)
    starts = ends - aligned
    n_placed = tl.sum(aligned, 0)
    if block == 0:
        tl.store(expert_offsets_ptr + experts, starts, mask=experts < E)
        tl.store(expert_offsets_ptr + experts + 1, ends, mask=experts == E - 1)

    next_position = starts + tl.sum(before, 0)
    for start in range(0, BLOCK, CHUNK):
        routes = block * BLOCK + start + tl.arange(0, CHUNK)
        chosen = _load_experts(ids_ptr, routes, n_routes, E)
        has_expert = chosen >= 0
        one_hot = (chosen[:, None] == experts[None, :]).to(tl.int32)
        positions = tl.sum(one_hot * (next_position[None, :] + tl.cumsum(one_hot, 0) - 1), 1)
        tl.store(route_to_sorted_ptr + routes, tl.where(has_expert, positions, -1), mask=routes < n_routes)
        tl.store(sorted_to_route_ptr + positions, routes, mask=has_expert)
        next_position += tl.sum(one_hot, 0)

    # what is nobody's: behind the last expert and, with ALIGN, behind each expert's last route
    for start in range(n_placed + block * BLOCK, n_sorted, tl.num_programs(0) * BLOCK):
        positions = start + tl.arange(0, BLOCK)
        tl.store(sorted_to_route_ptr + positions, -1, mask=positions < n_sorted)
    if ALIGN > 1:
        for expert in range(block, E, tl.num_programs(0)):
            first = tl.sum(tl.where(experts == expert, starts + sizes, 0), 0)
            end = tl.sum(tl.where(experts == expert, ends, 0), 0)
            positions = first + tl.arange(0, ALIGN)
            tl.store(sorted_to_route_ptr + positions, -1, mask=positions < end)


def forward(topk_ids: torch.Tensor, params) -> tuple[torch.Tensor, ...]:
    n_routes = topk_ids.numel()

    def empty(size):
        return topk_ids.new_empty((size,), dtype=torch.int32)

    expert_offsets, sorted_to_route, route_to_sorted = empty(params.num_experts + 1), empty(n_routes), empty(n_routes)
    sort(topk_ids, expert_offsets, sorted_to_route, route_to_sorted)
    return expert_offsets, sorted_to_route, route_to_sorted


def sort(topk_ids, expert_offsets, sorted_to_route, route_to_sorted, align: int = 1) -> None:
    """Write the three int32 tensors of `Routes`, contiguous; each expert's positions begin at a multiple of `align`.

    sorted_to_route is as long as the caller needs, -1 where there is no route.
    """
    ids = topk_ids.contiguous()
    n_routes, experts = ids.numel(), expert_offsets.numel() - 1
    width, block = launch.next_power_of_2(experts), block_routes(n_routes)
    n_blocks = launch.cdiv(n_routes, block)
    counts = ids.new_empty((n_blocks, width), dtype=torch.int32)
    tiles = {"EXPERTS": width, "BLOCK": block, "CHUNK": chunk(width), "num_warps": WARPS}
    with launch.on_device(ids):
        if n_routes:
            sort_routes_count_kernel[(n_blocks,)](ids, counts, n_routes, experts, **tiles)
        sort_routes_place_kernel[(max(n_blocks, 1),)](
            ids, counts, expert_offsets, sorted_to_route, route_to_sorted, n_routes, sorted_to_route.numel(),
            n_blocks, experts, SCAN_BLOCKS=chunk(width) // 2, ALIGN=align, **tiles,
        )  # fmt: skip
