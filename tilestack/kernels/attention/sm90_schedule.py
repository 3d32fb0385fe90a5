"""Which work the Hopper kernels do: blocks of a document's rows, in tables on the device.

    table[0] = number of items; table[1] = items of a section; table[8 + 8 i ...] = the fields of item i, 0 if not used

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

import torch
import triton
import triton.language as tl

from tilestack.kernels import launch
from tilestack.kernels._gluon import gl, gluon

FIELDS = gl.constexpr(8)  # integers of an item, two of them unused
BLOCK_ITEMS = 64
BLOCK_DOCUMENTS = 128


@gluon.jit
def work_item(t, items, n_heads, section_heads):
    """Piece of work t: the head, and the six fields of its item in the query table.

    A section is some items (whole documents) under section_heads heads, whose keys and values fit into L2 together; its
    pieces come before the next section's, heads fastest."""
    section_items = gl.load(items + 1)
    section = t // (section_items * section_heads)
    rest = t - section * (section_items * section_heads)
    head_sections = n_heads // section_heads
    item = section // head_sections * section_items + rest // section_heads
    entry = items + FIELDS * (item + 1)
    return (
        section % head_sections * section_heads + rest % section_heads,
        gl.load(entry),
        gl.load(entry + 1),
        gl.load(entry + 2),
        gl.load(entry + 3),
        gl.load(entry + 4),
        gl.load(entry + 5),
    )


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
        tl.store(table_ptr + 1, tl.maximum(before, 1))


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


def query_table(q, k, cu_seqlens_q, cu_seqlens_k, block_m: int, section: int = 0) -> tuple[torch.Tensor, int]:
    """The query table of a call, and an upper bound of its items; nothing is read back from the device.

    section: for dense input, the items of so many documents come before the next, those that see most keys first; 0
        leaves every table in the rows' order.
    """
    if cu_seqlens_q is None:
        batch, len_q, heads, _ = q.shape
        table = _dense_query_table(batch, len_q, k.shape[1], heads, block_m, section, q.device)
        return table, batch * launch.cdiv(len_q, block_m)
    return _packed_table(query_table_kernel, q.shape[0], cu_seqlens_q, cu_seqlens_k, block_m, BLOCK_M=block_m)


def key_table(q, k, cu_seqlens_q, cu_seqlens_k, block_m: int, block_n: int) -> tuple[torch.Tensor, int]:
    """The key table of a call, and an upper bound of its items; nothing is read back from the device."""
    if cu_seqlens_q is None:
        batch, len_k = k.shape[:2]
        table = _dense_key_table(batch, q.shape[1], len_k, block_m, block_n, q.device)
        return table, batch * launch.cdiv(len_k, block_n)
    blocks = {"BLOCK_M": block_m, "BLOCK_N": block_n}
    return _packed_table(key_table_kernel, k.shape[0], cu_seqlens_q, cu_seqlens_k, block_n, **blocks)


def _packed_table(
    kernel, total: int, cu_seqlens_q, cu_seqlens_k, block: int, **blocks: int
) -> tuple[torch.Tensor, int]:
    documents = cu_seqlens_q.numel() - 1
    bound = total // block + documents + 1
    table = cu_seqlens_q.new_empty((bound + 1) * FIELDS.value)
    with launch.on_device(cu_seqlens_q):
        kernel[(launch.cdiv(bound, BLOCK_ITEMS),)](
            cu_seqlens_q, cu_seqlens_k, table, documents, total, bound, **blocks,
            BLOCK_ITEMS=BLOCK_ITEMS, BLOCK_DOCUMENTS=BLOCK_DOCUMENTS, FIELDS=FIELDS.value, num_warps=8,
        )  # fmt: skip
    return table, bound


@functools.lru_cache(maxsize=64)
def _dense_query_table(
    batch: int, len_q: int, len_k: int, heads: int, block_m: int, section: int, device: torch.device
) -> torch.Tensor:
    n_blocks = launch.cdiv(len_q, block_m)
    item = torch.arange(batch * n_blocks, device=device, dtype=torch.int32)
    if section:  # the last queries see most keys
        begun, rest = item // (section * n_blocks), item % (section * n_blocks)
        document, start = begun * section + rest % section, (n_blocks - 1 - rest // section) * block_m
    else:
        document, start = item // n_blocks, item % n_blocks * block_m
    keys = torch.full_like(item, len_k)
    row_lse = document * heads * len_q + start
    fields = (document * len_q + start, len_q - start, document * len_k, keys, start + (len_k - len_q), row_lse)
    return _table(*fields, section=section * n_blocks)


@functools.lru_cache(maxsize=64)
def _dense_key_table(
    batch: int, len_q: int, len_k: int, block_m: int, block_n: int, device: torch.device
) -> torch.Tensor:
    n_blocks = launch.cdiv(len_k, block_n)
    item = torch.arange(batch * n_blocks, device=device, dtype=torch.int32)
    document = item // n_blocks
    keys, queries = torch.full_like(item, len_k), torch.full_like(item, len_q)
    first_block = document * launch.cdiv(len_q, block_m)
    return _table(document * len_k, keys, document * len_q, queries, item % n_blocks, first_block)


def _table(*fields: torch.Tensor, section: int = 0) -> torch.Tensor:
    n_items = fields[0].numel()
    table = fields[0].new_zeros(n_items + 1, FIELDS.value)
    table[0, 0] = n_items
    table[0, 1] = section
    table[1:, : len(fields)] = torch.stack(fields, 1)
    return table.view(-1)
