"""kv_cache_append in plain torch: the definition. Lengths are read on the host: on a GPU this waits for the device."""

from __future__ import annotations

import torch

from tilestack.kernels.dispatch import Call
from tilestack.kernels.kv_cache_append.cache import capacity, rotated, sequence_positions


def refuses(call: Call) -> str | None:
    return None


def update(k_cache, v_cache, k, v, cache_seqlens, block_table, cache_batch_idx, rotary_cos, rotary_sin, params) -> None:
    room = capacity(k_cache, block_table)
    for sequence, length in enumerate(cache_seqlens.tolist()):
        begin = max(length, 0)
        end = max(min(length + k.shape[1], room), begin)
        new = slice(begin - length, end - length)
        rows = k[sequence, new]
        if rotary_cos is not None:
            positions = torch.arange(begin, end, device=k.device)
            rows = rotated(rows, positions, rotary_cos, rotary_sin, params.rotary_interleaved)
        places = sequence_positions(k_cache, sequence, begin, end, block_table, cache_batch_idx)
        k_cache[places] = rows
        v_cache[places] = v[sequence, new]
