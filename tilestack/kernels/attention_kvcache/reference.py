"""attention_kvcache in plain torch: the definition. A sequence's keys are gathered for the reference of `attention`.

Lengths and places are read on the host: on a GPU this waits for the device.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from tilestack.kernels.attention import attention
from tilestack.kernels.attention.layout import empty_lse
from tilestack.kernels.dispatch import Call
from tilestack.kernels.kv_cache_append.cache import capacity, rotated, sequence_positions

AUXILIARY = ()


def refuses(call: Call) -> str | None:
    return None


def forward(
    q, k_cache, v_cache, cache_seqlens, block_table, cache_batch_idx, cache_leftpad, cu_seqlens_q, sinks, alibi_slopes,
    rotary_cos, rotary_sin, params,
):  # fmt: skip
    out, lse = torch.zeros_like(q, memory_format=torch.contiguous_format), empty_lse(q).fill_(-torch.inf)
    if sinks is not None:  # queries of no sequence have a sink too
        lse.copy_(sinks[:, None].expand(lse.shape))
    room = capacity(k_cache, block_table)
    for sequence, (queries, its_out, its_lse) in enumerate(_sequences(q, out, lse, cu_seqlens_q)):
        taken = room if cache_seqlens is None else int(cache_seqlens[sequence])
        begin = 0 if cache_leftpad is None else int(cache_leftpad[sequence])
        end = max(min(taken + params.new_keys, room), begin)
        if rotary_cos is not None:
            positions = _query_positions(taken, queries, params)
            queries = rotated(queries, positions, rotary_cos, rotary_sin, params.rotary_interleaved)
        places = sequence_positions(k_cache, sequence, begin, end, block_table, cache_batch_idx)
        slopes = alibi_slopes
        if slopes is not None and slopes.dim() == 2:
            slopes = slopes[sequence]
        found = attention(
            queries[None], k_cache[places][None], v_cache[places][None], softmax_scale=params.softmax_scale,
            window_size=(params.window_left, params.window_right), softcap=params.softcap, sinks=sinks,
            alibi_slopes=slopes, return_lse=True, implementation="reference",
        )  # fmt: skip
        its_out.copy_(found[0][0])
        its_lse.copy_(found[1][0])
    return out, lse


def _sequences(q, out, lse, cu_seqlens_q) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """The queries [Sq, Hq, D] of each sequence, and where its output [Sq, Hq, D] and lse [Hq, Sq] go."""
    if cu_seqlens_q is None:
        yield from zip(q, out, lse, strict=True)
        return
    offsets = cu_seqlens_q.tolist()
    for begin, end in zip(offsets[:-1], offsets[1:], strict=True):
        yield q[begin:end], out[begin:end], lse[:, begin:end]


def _query_positions(taken: int, queries: torch.Tensor, params) -> torch.Tensor:
    positions = torch.full((queries.shape[0],), taken, device=queries.device)
    if params.window_left >= 0 or params.window_right >= 0:
        positions += torch.arange(queries.shape[0], device=queries.device)
    return positions
