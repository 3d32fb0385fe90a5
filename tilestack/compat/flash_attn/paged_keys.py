"""Keys that do not simply lie between their offsets, gathered so that they do.

flash-attn's packed forward reads keys through a table of pages (block_table), behind padding on the left (leftpad_k),
or only the first of those allocated (seqused_k). Here they are copied, one after the other, before attention runs: one
pass over the keys more, nothing read on the host.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812  (torch's own habit)

from tilestack.compat.flash_attn.errors import check


def gather_keys(
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_k: int,
    block_table: torch.Tensor | None,
    leftpad_k: torch.Tensor | None,
    seqused_k: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(k, v, cu_seqlens_k) in which sequence b has its keys between cu_seqlens_k[b] and cu_seqlens_k[b + 1].

    k, v: [total_k, Hk, D], or with block_table [blocks, page, Hk, D].
    block_table: [batch, pages], int32: the pages of each sequence in order.
    leftpad_k, seqused_k: [batch], int32: the first key that counts, and how many keys there are, padding included.
    """
    _check(k, cu_seqlens_k, block_table, leftpad_k, seqused_k)
    lengths = cu_seqlens_k.diff() if seqused_k is None else seqused_k
    if leftpad_k is not None:
        lengths = lengths - leftpad_k
    offsets = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    batch = lengths.numel()
    n_rows = k.shape[0] if block_table is None else batch * max_seqlen_k
    rows = torch.arange(n_rows, device=k.device)
    sequence = torch.searchsorted(offsets[1:], rows, right=True).clamp_max(batch - 1)
    position = rows - offsets[sequence]
    if block_table is None:
        start = cu_seqlens_k[:-1] if leftpad_k is None else cu_seqlens_k[:-1] + leftpad_k
        source = start[sequence] + position
    else:
        page = k.shape[1]
        column = (position // page).clamp_max(block_table.shape[1] - 1)
        source = block_table[sequence, column].long() * page + position % page
        k, v = k.flatten(0, 1), v.flatten(0, 1)
    source = source.clamp(0, k.shape[0] - 1)  # of rows behind the last sequence, which nobody reads
    return k.index_select(0, source), v.index_select(0, source), offsets


def _check(k, cu_seqlens_k, block_table, leftpad_k, seqused_k) -> None:
    batch = cu_seqlens_k.numel() - 1
    for name, each in (("leftpad_k", leftpad_k), ("seqused_k", seqused_k)):
        if each is not None:
            check(each.dtype == torch.int32, name, "int32", each.dtype)
            check(tuple(each.shape) == (batch,), name, f"[{batch}]", list(each.shape))
    if block_table is None:
        return
    check(leftpad_k is None, "leftpad_k", "None where there is a block_table", leftpad_k)
    check(block_table.dtype == torch.int32, "block_table", "int32", block_table.dtype)
    fits = block_table.dim() == 2 and block_table.shape[0] == batch
    check(fits, "block_table", f"[{batch}, pages]", list(block_table.shape))
    check(k.dim() == 4, "k", "[blocks, page, heads, head_dim] where there is a block_table", list(k.shape))
    check(k.shape[1] % 256 == 0, "the page size", "a multiple of 256", k.shape[1])
