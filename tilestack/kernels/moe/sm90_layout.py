"""Where rows lie in the Hopper kernels of moe: one launch over the result of sort_routes, no look from the host.

A row is a route in sorted order, but each expert's rows begin at a multiple of 64. So a warpgroup owns 64 rows of one
expert, and no store through TMA needs a mask. Rows that pad have no route: they are gathered as zeros, and what is
computed from them is exactly zero.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tilestack.kernels import launch
from tilestack.kernels.moe.sm90_configs import LAYOUT_CHUNK, LAYOUT_WARPS
from tilestack.kernels.sort_routes import triton_portable as sorting
from tilestack.kernels.sort_routes.op import SortRoutesParams

HALF = 64  # rows of a consumer
BLOCK = 128  # rows of a tile
SECOND = 1 << 16  # added to the expert of a block whose second half has rows


@triton.jit
def _owned(index, lasts, sizes):
    """[CHUNK, E]: which group of `sizes` each index falls into; `lasts` are the ends of the groups."""
    return ((lasts - sizes)[None, :] <= index[:, None]) & (index[:, None] < lasts[None, :])


@triton.jit
def moe_layout_kernel(
    expert_offsets_ptr, sorted_to_route_ptr, route_to_sorted_ptr, row_to_route_ptr, route_to_row_ptr,
    row_offsets_ptr, by_size_ptr, block_expert_ptr, block_row_ptr, n_blocks_ptr, n_routes, n_halves, max_blocks, E,
    EXPERTS: tl.constexpr, CHUNK: tl.constexpr, HALF: tl.constexpr, SECOND: tl.constexpr,
):  # fmt: skip
    experts = tl.arange(0, EXPERTS)
    starts = tl.load(expert_offsets_ptr + experts, mask=experts < E, other=0)
    ends = tl.load(expert_offsets_ptr + experts + 1, mask=experts < E, other=0)
    halves = (ends - starts + HALF - 1) // HALF
    last_halves = tl.cumsum(halves, 0)
    first_rows = (last_halves - halves) * HALF
    blocks = (halves + 1) // 2
    last_blocks = tl.cumsum(blocks, 0)
    index = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)

    # the routes of half blocks `index`
    owned = _owned(index, last_halves, halves)
    place = tl.sum(tl.where(owned, (starts - first_rows)[None, :], 0), 1)[:, None]
    end = tl.sum(tl.where(owned, ends[None, :], 0), 1)[:, None]
    rows = index[:, None] * HALF + tl.arange(0, HALF)[None, :]
    is_route = rows + place < end
    routes = tl.load(sorted_to_route_ptr + rows + place, mask=is_route, other=-1)
    tl.store(row_to_route_ptr + rows, routes, mask=(index < n_halves)[:, None])
    tl.store(route_to_row_ptr + routes, rows, mask=is_route)
    is_absent = tl.load(route_to_sorted_ptr + rows, mask=rows < n_routes, other=0) < 0
    tl.store(route_to_row_ptr + rows, -1, mask=is_absent)

    # the expert and the first row of blocks `index`
    owned = _owned(index, last_blocks, blocks)
    row = tl.sum(tl.where(owned, (first_rows - (last_blocks - blocks) * 2 * HALF)[None, :], 0), 1) + index * 2 * HALF
    has_second = row + HALF < tl.sum(tl.where(owned, (last_halves * HALF)[None, :], 0), 1)
    expert = tl.sum(tl.where(owned, experts[None, :], 0), 1)
    tl.store(block_expert_ptr + index, expert + has_second.to(tl.int32) * SECOND, mask=index < max_blocks)
    tl.store(block_row_ptr + index, row, mask=index < max_blocks)

    # experts `index` by the number of their rows, the largest first, equal ones in order
    size = tl.sum(tl.where(index[:, None] == experts[None, :], halves[None, :], 0), 1)[:, None]
    is_before = (halves[None, :] > size) | ((halves[None, :] == size) & (experts[None, :] < index[:, None]))
    rank = tl.sum((is_before & (experts < E)[None, :]).to(tl.int32), 1)
    tl.store(by_size_ptr + rank, index, mask=index < E)

    if tl.program_id(0) == 0:
        tl.store(row_offsets_ptr + experts, first_rows, mask=experts < E)
        tl.store(row_offsets_ptr + experts + 1, last_halves * HALF, mask=experts == E - 1)
        tl.store(n_blocks_ptr, tl.sum(blocks, 0))


class Layout:
    """Views of one int32 tensor, which is what backward keeps.

    row_to_route [rows + 64]: -1 where a row has no route. route_to_row [T * K]: -1 where a route has no expert.
    row_offsets [E + 1]: where each expert's rows begin. by_size [E]: the experts, the one with most rows first.
    block_expert, block_row [max_blocks]: expert (plus SECOND) and first row of each block of 128; n_blocks [1].
    rows: how many rows there may be.
    """

    def __init__(self, table: torch.Tensor, routes: int, experts: int):
        self.table, self.routes, self.experts = table, routes, experts
        self.rows = max_rows(routes, experts)
        self.max_blocks = routes // BLOCK + min(routes, experts)
        parts = table.split(_lengths(routes, experts))
        self.row_to_route, self.route_to_row, self.row_offsets, self.by_size = parts[:4]
        self.route_to_row = self.route_to_row[:routes]
        self.block_expert, self.block_row, self.n_blocks = parts[4:]

    @staticmethod
    def of(topk_ids: torch.Tensor, experts: int) -> Layout:
        """Sort the routes and lay them out: four launches."""
        offsets, sorted_to_route, route_to_sorted = sorting.forward(topk_ids, SortRoutesParams(experts))
        routes = topk_ids.numel()
        layout = Layout(offsets.new_empty(table_length(routes, experts)), routes, experts)
        n_halves = layout.rows // HALF + 1
        with launch.on_device(topk_ids):
            moe_layout_kernel[(launch.cdiv(max(n_halves, experts), LAYOUT_CHUNK),)](
                offsets, sorted_to_route, route_to_sorted, layout.row_to_route, layout.route_to_row,
                layout.row_offsets, layout.by_size, layout.block_expert, layout.block_row, layout.n_blocks,
                routes, n_halves, layout.max_blocks, experts, EXPERTS=launch.next_power_of_2(experts),
                CHUNK=LAYOUT_CHUNK, HALF=HALF, SECOND=SECOND, num_warps=LAYOUT_WARPS,
            )  # fmt: skip
        return layout


def max_rows(routes: int, experts: int) -> int:
    """A bound on the rows: every expert that can have a route may end in a half block with one."""
    return (routes // HALF + min(routes, experts)) * HALF


def table_length(routes: int, experts: int) -> int:
    """The length of `Layout.table`."""
    return sum(_lengths(routes, experts))


def _lengths(routes: int, experts: int) -> list[int]:
    blocks = routes // BLOCK + min(routes, experts)
    lengths = (max_rows(routes, experts) + HALF, routes, experts + 1, experts, blocks, blocks, 1)
    return [(length + 3) // 4 * 4 for length in lengths]  # every part begins at a multiple of 16 bytes
