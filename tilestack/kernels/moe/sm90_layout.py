"""Where rows lie in the Hopper kernels of moe: sort_routes with more in its last launch, no look from the host.

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
from tilestack.kernels.sort_routes.configs import BLOCK_ROUTES
from tilestack.kernels.sort_routes.triton_portable import place_routes

HALF = 64  # rows of a consumer
BLOCK = 128  # rows of a tile
SECOND = 1 << 16  # added to an expert whose last block has rows in its second half
FEW_BLOCKS = 4  # of an expert
TICKETS = ("up", "down", "dx", "ddown", "dgate_up")  # the products whose tiles go to whoever is free, 4 integers each
COUNTERS = 32


@triton.jit
def moe_layout_kernel(
    ids_ptr, before_ptr, row_offsets_ptr, row_to_route_ptr, route_to_row_ptr, by_size_ptr, blocks_ptr,
    n_blocks_ptr, counters_ptr, n_routes, n_rows, n_route_blocks, max_blocks, E,
    EXPERTS: tl.constexpr, BLOCK_ROUTES: tl.constexpr, CHUNK: tl.constexpr, HALF: tl.constexpr, SECOND: tl.constexpr,
    COUNTERS: tl.constexpr,
):  # fmt: skip
    first_rows, rows = place_routes(
        ids_ptr, before_ptr, row_offsets_ptr, row_to_route_ptr, route_to_row_ptr, n_routes, n_rows, n_route_blocks, E,
        EXPERTS, BLOCK_ROUTES, HALF,
    )  # fmt: skip
    experts = tl.arange(0, EXPERTS)
    blocks = (rows + 2 * HALF - 1) // (2 * HALF)
    last_blocks = tl.cumsum(blocks, 0)
    first_blocks = last_blocks - blocks
    index = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    if tl.program_id(0) * CHUNK < max_blocks:  # the expert of blocks `index`, its first block and row, its blocks
        owned = (first_blocks[None, :] <= index[:, None]) & (index[:, None] < last_blocks[None, :])
        has_second = (rows % (2 * HALF) == 0).to(tl.int32)
        expert = tl.sum(tl.where(owned, (experts + has_second * SECOND)[None, :], 0), 1)
        count = tl.sum(tl.where(owned, blocks[None, :], 0), 1)
        entry, inside = blocks_ptr + index * 4, index < max_blocks
        tl.store(entry, expert, mask=inside)
        tl.store(entry + 1, tl.sum(tl.where(owned, first_blocks[None, :], 0), 1), mask=inside)
        tl.store(entry + 2, tl.maximum(count, 1), mask=inside)
        tl.store(entry + 3, tl.sum(tl.where(owned, first_rows[None, :], 0), 1), mask=inside)
    if tl.program_id(0) * CHUNK < E:  # experts `index` by the number of their rows, the largest first, then in order
        size = tl.sum(tl.where(index[:, None] == experts[None, :], rows[None, :], 0), 1)[:, None]
        is_before = (rows[None, :] > size) | ((rows[None, :] == size) & (experts[None, :] < index[:, None]))
        rank = tl.sum((is_before & (experts < E)[None, :]).to(tl.int32), 1)
        tl.store(by_size_ptr + rank, index, mask=index < E)
    if tl.program_id(0) == 0:
        tl.store(n_blocks_ptr, tl.sum(blocks, 0))
        tl.store(counters_ptr + tl.arange(0, COUNTERS), tl.zeros([COUNTERS], tl.int32))


class Layout:
    """Views of one int32 tensor, which is what backward keeps.

    row_to_route [rows + 64]: -1 where a row has no route. route_to_row [T * K]: -1 where a route has no expert.
    row_offsets [E + 1]: where each expert's rows begin. by_size [E]: the experts, the one with most rows first.
    blocks [max_blocks, 4]: for each block of 128 rows its expert (plus SECOND), the expert's first block, how many
    it has, and its first row. n_blocks [1]. counters [32]: tickets that a running kernel has given out, else 0.
    rows: how many rows there may be, of at most `most` routes that have an expert.
    has_many_blocks: an expert may have more than FEW_BLOCKS blocks in the mean.
    """

    def __init__(self, table: torch.Tensor, routes: int, experts: int, most: int | None = None):
        self.table, self.routes, self.experts = table, routes, experts
        most = routes if most is None else most
        self.rows = max_rows(most, experts)
        self.has_many_blocks = most > FEW_BLOCKS * BLOCK * experts
        self.max_blocks = most // BLOCK + min(most, experts)
        parts = table.split(_lengths(routes, experts, most))
        row_to_route, route_to_row, row_offsets, self.by_size, self.blocks, self.n_blocks, self.counters = parts
        self.row_to_route, self.row_offsets = row_to_route[: self.rows + HALF], row_offsets[: experts + 1]
        self.route_to_row = route_to_row[:routes]

    def tickets(self, product: str) -> torch.Tensor:
        """The counter of one of TICKETS."""
        return self.counters[4 * TICKETS.index(product) :]

    @staticmethod
    def of(topk_ids: torch.Tensor, experts: int, most: int) -> Layout:
        """Sort the routes and lay them out: three launches."""
        ids, routes = topk_ids.contiguous(), topk_ids.numel()
        before = sorting.counts_before(ids, experts)
        table = ids.new_empty((table_length(routes, experts, most),), dtype=torch.int32)
        layout = Layout(table, routes, experts, most)
        n_route_blocks = before.shape[0] - 1
        grid = max(n_route_blocks, launch.cdiv(max(layout.max_blocks, experts), LAYOUT_CHUNK))
        with launch.on_device(ids):
            launch.run(
                moe_layout_kernel, (grid,),
                ids, before, layout.row_offsets, layout.row_to_route, layout.route_to_row, layout.by_size,
                layout.blocks, layout.n_blocks, layout.counters, routes, layout.rows + HALF, n_route_blocks,
                layout.max_blocks, experts, EXPERTS=before.shape[1], BLOCK_ROUTES=BLOCK_ROUTES,
                CHUNK=LAYOUT_CHUNK, HALF=HALF, SECOND=SECOND, COUNTERS=COUNTERS, num_warps=LAYOUT_WARPS,
            )  # fmt: skip
        return layout


def max_rows(routes: int, experts: int) -> int:
    """A bound on the rows: every expert that can have a route may end in a half block with one."""
    return (routes // HALF + min(routes, experts)) * HALF


def table_length(routes: int, experts: int, most: int | None = None) -> int:
    """The length of `Layout.table`."""
    return sum(_lengths(routes, experts, routes if most is None else most))


def _lengths(routes: int, experts: int, most: int) -> list[int]:
    blocks = most // BLOCK + min(most, experts)
    lengths = (max_rows(most, experts) + HALF, routes, experts + 1, experts, 4 * blocks, 1, COUNTERS)
    return [(length + 3) // 4 * 4 for length in lengths]  # every part begins at a multiple of 16 bytes
