"""Which work the Hopper kernels do: blocks of a document's rows, in tables on the device.

    table[0] = number of items; table[8 + 8 i ...] = the fields of item i, 0 if not used

For packed input a small kernel writes the table, because documents begin anywhere and the host must not read
cu_seqlens; the rows after the last offset make a document of their own, which sees nothing, so that they are written
too. For dense input the table depends on the shapes alone and is kept.

Query table, blocks of BLOCK_M queries: (row of the block's first query, queries from there to the document's end, row
of the document's first key, its keys, the first query's own position among them, lse's index of that query in head 0).

Key table, blocks of BLOCK_N keys: (row of the document's first key, its keys, row of its first query, its queries, the
block's number in the document, the document's first block in the query table).
"""

from __future__ import annotations

import functools
import heapq
import itertools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from tilestack.kernels import launch
from tilestack.kernels._gluon import gl, gluon
from tilestack.kernels.attention.sm90_configs import forward_sections

FIELDS = gl.constexpr(8)  # integers of an item, two of them unused
ITEM_COST = 2  # what an item costs beside its key tiles, in tiles
BLOCK_ITEMS = 64
BLOCK_DOCUMENTS = 128


@gluon.jit
def work_item(t, items, n_heads):
    """Piece of work t, heads fastest: the head, and the six fields of its item in the query table."""
    entry = items + FIELDS * (t // n_heads + 1)
    return (
        t % n_heads,
        gl.load(entry),
        gl.load(entry + 1),
        gl.load(entry + 2),
        gl.load(entry + 3),
        gl.load(entry + 4),
        gl.load(entry + 5),
    )


@gluon.jit
def share(schedule, n_pieces, SCHEDULED: gl.constexpr):
    """This program's pieces of work: (first, end, step) of a loop whose index `piece` turns into a piece."""
    if SCHEDULED:
        return gl.load(schedule + gl.program_id(0)), gl.load(schedule + gl.program_id(0) + 1), 1
    else:
        return gl.program_id(0), n_pieces, gl.num_programs(0)


@gluon.jit
def piece(schedule, index, SCHEDULED: gl.constexpr):
    return gl.load(schedule + gl.num_programs(0) + 1 + index) if SCHEDULED else index


@triton.jit
def _document(cu_ptr, documents, n_documents, total):
    """First rows and lengths; document n_documents is what lies after the last offset."""
    begin = tl.load(cu_ptr + documents, mask=documents <= n_documents, other=0)
    end = tl.load(cu_ptr + documents + 1, mask=documents < n_documents, other=0)
    end = tl.where(documents == n_documents, total, end)
    return begin, end - begin


@triton.jit
def query_table_kernel(
    cu_q_ptr, cu_k_ptr, table_ptr, n_documents, total_q, bound,
    BLOCK_M: tl.constexpr, BLOCK_ITEMS: tl.constexpr, BLOCK_DOCUMENTS: tl.constexpr, FIELDS: tl.constexpr,
):  # fmt: skip
    # every program counts the items of all documents again (a few thousand additions) and writes BLOCK_ITEMS entries
    slots = tl.program_id(0) * BLOCK_ITEMS + tl.arange(0, BLOCK_ITEMS)
    before = tl.full([], 0, tl.int32)
    row_q = tl.zeros([BLOCK_ITEMS], tl.int32)
    n_q = tl.zeros([BLOCK_ITEMS], tl.int32)
    row_k = tl.zeros([BLOCK_ITEMS], tl.int32)
    n_k = tl.zeros([BLOCK_ITEMS], tl.int32)
    position = tl.zeros([BLOCK_ITEMS], tl.int32)
    for start in range(0, n_documents + 1, BLOCK_DOCUMENTS):
        documents = start + tl.arange(0, BLOCK_DOCUMENTS)
        begin_q, len_q = _document(cu_q_ptr, documents, n_documents, total_q)
        begin_k, len_k = _document(cu_k_ptr, documents, n_documents, 0)
        len_k = tl.where(documents < n_documents, len_k, 0)
        count = (len_q + BLOCK_M - 1) // BLOCK_M
        first = before + tl.cumsum(count, 0) - count
        m = slots[:, None] - first[None, :]
        mine = ((m >= 0) & (m < count[None, :])).to(tl.int32)  # one document for each slot in use, none for the others
        row_q += tl.sum(mine * (begin_q[None, :] + m * BLOCK_M), 1)
        n_q += tl.sum(mine * (len_q[None, :] - m * BLOCK_M), 1)
        row_k += tl.sum(mine * begin_k[None, :], 1)
        n_k += tl.sum(mine * len_k[None, :], 1)
        position += tl.sum(mine * (m * BLOCK_M + (len_k - len_q)[None, :]), 1)
        before += tl.sum(count, 0)
    entries = table_ptr + FIELDS * (slots + 1)
    mask = slots < bound
    tl.store(entries, row_q, mask=mask)
    tl.store(entries + 1, n_q, mask=mask)
    tl.store(entries + 2, row_k, mask=mask)
    tl.store(entries + 3, n_k, mask=mask)
    tl.store(entries + 4, position, mask=mask)
    tl.store(entries + 5, row_q, mask=mask)
    if tl.program_id(0) == 0:
        tl.store(table_ptr, before)


@triton.jit
def key_table_kernel(
    cu_q_ptr, cu_k_ptr, table_ptr, n_documents, total_k, bound,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_ITEMS: tl.constexpr, BLOCK_DOCUMENTS: tl.constexpr,
    FIELDS: tl.constexpr,
):  # fmt: skip
    slots = tl.program_id(0) * BLOCK_ITEMS + tl.arange(0, BLOCK_ITEMS)
    before = tl.full([], 0, tl.int32)
    blocks_before = tl.full([], 0, tl.int32)
    row_k = tl.zeros([BLOCK_ITEMS], tl.int32)
    n_k = tl.zeros([BLOCK_ITEMS], tl.int32)
    row_q = tl.zeros([BLOCK_ITEMS], tl.int32)
    n_q = tl.zeros([BLOCK_ITEMS], tl.int32)
    number = tl.zeros([BLOCK_ITEMS], tl.int32)
    first_block = tl.zeros([BLOCK_ITEMS], tl.int32)
    for start in range(0, n_documents + 1, BLOCK_DOCUMENTS):
        documents = start + tl.arange(0, BLOCK_DOCUMENTS)
        begin_q, len_q = _document(cu_q_ptr, documents, n_documents, 0)
        len_q = tl.where(documents < n_documents, len_q, 0)
        begin_k, len_k = _document(cu_k_ptr, documents, n_documents, total_k)
        count = (len_k + BLOCK_N - 1) // BLOCK_N
        blocks = (len_q + BLOCK_M - 1) // BLOCK_M
        n = slots[:, None] - (before + tl.cumsum(count, 0) - count)[None, :]
        mine = ((n >= 0) & (n < count[None, :])).to(tl.int32)
        row_k += tl.sum(mine * begin_k[None, :], 1)
        n_k += tl.sum(mine * len_k[None, :], 1)
        row_q += tl.sum(mine * begin_q[None, :], 1)
        n_q += tl.sum(mine * len_q[None, :], 1)
        number += tl.sum(mine * n, 1)
        first_block += tl.sum(mine * (blocks_before + tl.cumsum(blocks, 0) - blocks)[None, :], 1)
        before += tl.sum(count, 0)
        blocks_before += tl.sum(blocks, 0)
    entries = table_ptr + FIELDS * (slots + 1)
    mask = slots < bound
    tl.store(entries, row_k, mask=mask)
    tl.store(entries + 1, n_k, mask=mask)
    tl.store(entries + 2, row_q, mask=mask)
    tl.store(entries + 3, n_q, mask=mask)
    tl.store(entries + 4, number, mask=mask)
    tl.store(entries + 5, first_block, mask=mask)
    if tl.program_id(0) == 0:
        tl.store(table_ptr, before)


def packed_bound(total: int, documents: int, block: int) -> int:
    """How many blocks `total` packed rows have at most, those after the last document among them."""
    return total // block + documents + 1


def packed_query_table(cu_seqlens_q, cu_seqlens_k, total_q: int, bound: int, block_m: int) -> torch.Tensor:
    """The query table of packed input; nothing is read back from the device."""
    return _packed_table(query_table_kernel, total_q, bound, cu_seqlens_q, cu_seqlens_k, BLOCK_M=block_m)


def packed_key_table(cu_seqlens_q, cu_seqlens_k, total_k: int, bound: int, block_m: int, block_n: int) -> torch.Tensor:
    """The key table of packed input; nothing is read back from the device."""
    blocks = {"BLOCK_M": block_m, "BLOCK_N": block_n}
    return _packed_table(key_table_kernel, total_k, bound, cu_seqlens_q, cu_seqlens_k, **blocks)


@functools.lru_cache(maxsize=64)
def dense_schedule(
    q_shape: tuple[int, ...],
    k_shape: tuple[int, ...],
    block_m: int,
    block_n: int,
    window: tuple[int, int],
    programs: int,
    device: torch.device,
) -> torch.Tensor:
    """Who does which piece of dense work: where each program's pieces begin [programs + 1], then the pieces.

    Pieces go in sections of documents and heads whose keys and values fit into L2 together, those that see most keys
    first, each to the program that is free first. Dealt out in turn instead, the long pieces of short sections meet the
    same programs again and again.
    """
    batch, len_q, heads, head_dim = q_shape
    _, len_k, kv_heads, _ = k_shape
    sections = forward_sections(batch, len_k, heads, kv_heads, head_dim)
    costs = [_tiles(m, block_m, block_n, len_q, len_k, window) for m in range(launch.cdiv(len_q, block_m))]
    free = [(0, program) for program in range(programs)]
    pieces: list[list[int]] = [[] for _ in range(programs)]
    for m, document, head in _pieces(batch, heads, sections, len(costs)):
        busy_until, program = heapq.heappop(free)
        pieces[program].append((document * len(costs) + m) * heads + head)
        heapq.heappush(free, (busy_until + costs[m] + ITEM_COST, program))
    starts = [0, *itertools.accumulate(map(len, pieces))]
    return torch.tensor(starts + list(itertools.chain(*pieces)), dtype=torch.int32).to(device)


def _pieces(batch: int, heads: int, sections: tuple[int, int], n_blocks: int) -> Iterator[tuple[int, int, int]]:
    """(block of queries, document, head), section by section; the last queries, which see most keys, come first."""
    documents, section_heads = sections
    for first_document in range(0, batch, documents):
        for first_head in range(0, heads, section_heads):
            yield from itertools.product(
                reversed(range(n_blocks)),
                range(first_document, first_document + documents),
                range(first_head, first_head + section_heads),
            )


def _tiles(m: int, block_m: int, block_n: int, len_q: int, len_k: int, window: tuple[int, int]) -> int:
    """Key tiles that block m of the queries sees, as `key_tiles` of the kernel has it."""
    left, right = window
    position = m * block_m + len_k - len_q
    high = len_k if right < 0 else min(len_k, position + min(len_q - m * block_m, block_m) + right)
    last = launch.cdiv(max(high, 1), block_n)
    return last if left < 0 else last - min(max(position - left, 0) // block_n, last - 1)


def _packed_table(kernel, total: int, bound: int, cu_seqlens_q, cu_seqlens_k, **blocks: int) -> torch.Tensor:
    table = cu_seqlens_q.new_empty((bound + 1) * FIELDS.value)
    with launch.on_device(cu_seqlens_q):
        launch.run(
            kernel, (launch.cdiv(bound, BLOCK_ITEMS),),
            cu_seqlens_q, cu_seqlens_k, table, cu_seqlens_q.numel() - 1, total, bound, **blocks,
            BLOCK_ITEMS=BLOCK_ITEMS, BLOCK_DOCUMENTS=BLOCK_DOCUMENTS, FIELDS=FIELDS.value, num_warps=8,
        )  # fmt: skip
    return table


@functools.lru_cache(maxsize=64)
def dense_query_table(
    batch: int, len_q: int, len_k: int, heads: int, block_m: int, device: torch.device
) -> torch.Tensor:
    """The query table of dense input, whose number of items is batch * cdiv(len_q, block_m)."""
    n_blocks = launch.cdiv(len_q, block_m)
    item = torch.arange(batch * n_blocks, device=device, dtype=torch.int32)
    document, start = item // n_blocks, item % n_blocks * block_m
    keys = torch.full_like(item, len_k)
    row_lse = document * heads * len_q + start
    return _table(document * len_q + start, len_q - start, document * len_k, keys, start + (len_k - len_q), row_lse)


@functools.lru_cache(maxsize=64)
def dense_key_table(
    batch: int, len_q: int, len_k: int, block_m: int, block_n: int, device: torch.device
) -> torch.Tensor:
    """The key table of dense input, whose number of items is batch * cdiv(len_k, block_n)."""
    n_blocks = launch.cdiv(len_k, block_n)
    item = torch.arange(batch * n_blocks, device=device, dtype=torch.int32)
    document = item // n_blocks
    keys, queries = torch.full_like(item, len_k), torch.full_like(item, len_q)
    first_block = document * launch.cdiv(len_q, block_m)
    return _table(document * len_k, keys, document * len_q, queries, item % n_blocks, first_block)


def _table(*fields: torch.Tensor) -> torch.Tensor:
    n_items = fields[0].numel()
    table = fields[0].new_zeros(n_items + 1, FIELDS.value)
    table[0, 0] = n_items
    table[1:, : len(fields)] = torch.stack(fields, 1)
    return table.view(-1)
