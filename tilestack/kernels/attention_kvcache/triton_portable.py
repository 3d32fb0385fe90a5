"""attention_kvcache in Triton: the host side. The kernels are in triton_kernels.py.

Everything is decided from shapes: no length is read on the host, so a call can be captured in a CUDA graph and replayed
while cache_seqlens and block_table change.
"""

from __future__ import annotations

import torch

from tilestack.kernels import launch
from tilestack.kernels.attention.layout import empty_lse
from tilestack.kernels.attention_kvcache import configs
from tilestack.kernels.attention_kvcache.triton_kernels import (
    attention_kvcache_combine_kernel,
    attention_kvcache_kernel,
)
from tilestack.kernels.device import Device
from tilestack.kernels.dispatch import Call
from tilestack.kernels.kv_cache_append.cache import capacity

AUXILIARY = ()


def refuses(call: Call) -> str | None:
    head_dim = call.shape("q")[-1]
    if call.dtype("q") == torch.float64:
        return "has no float64 path"
    if head_dim > configs.MAX_HEAD_DIM:
        return f"takes head dimensions up to {configs.MAX_HEAD_DIM}, got {head_dim}"
    for name in ("k_cache", "v_cache"):
        spec = call.tensors[name]
        if spec.stride[-1] != 1 and spec.shape[-1] != 1:
            return f"reads heads of adjacent numbers, {name} has strides {list(spec.stride)}"
    return None


def forward(
    q, k_cache, v_cache, cache_seqlens, block_table, cache_batch_idx, cache_leftpad, cu_seqlens_q, sinks, alibi_slopes,
    rotary_cos, rotary_sin, params,
):  # fmt: skip
    out, lse = q.new_empty(q.shape), empty_lse(q)
    if q.numel() == 0:
        return out, lse
    q = q if q.stride(-1) == 1 else q.contiguous()
    vectors = [_dense(each) for each in (cache_seqlens, block_table, cache_batch_idx, cache_leftpad, cu_seqlens_q)]
    sinks, alibi_slopes, rotary_cos, rotary_sin = map(_dense, (sinks, alibi_slopes, rotary_cos, rotary_sin))
    tile, n_blocks, n_splits = _plan(q, k_cache, block_table, cu_seqlens_q, params)
    batch, total_q = (q.shape[0] if q.dim() == 4 else 1), q.shape[-3]
    parts, largest, total = out, None, None
    if n_splits > 1:
        parts = q.new_empty((n_splits, *q.shape), dtype=torch.float32)
        largest, total = (parts.new_empty(parts.shape[:-1]) for _ in range(2))
    precision = "ieee" if q.dtype == torch.float32 else "tf32"
    sizes = {"HEAD_DIM": q.shape[-1], "BLOCK_D": _block_d(q), "PRECISION": precision}
    with launch.on_device(q):
        launch.run(
            attention_kvcache_kernel, (batch * n_splits * n_blocks * k_cache.shape[2],),
            q, k_cache, v_cache, parts, lse, largest, total, *vectors, sinks, alibi_slopes, rotary_cos, rotary_sin,
            q.stride(0) if q.dim() == 4 else 0, *q.stride()[-3:-1], *k_cache.stride()[:3], *v_cache.stride()[:3],
            0 if block_table is None else block_table.shape[1],
            q.shape[-2] if alibi_slopes is not None and alibi_slopes.dim() == 2 else 0,
            batch if cu_seqlens_q is None else cu_seqlens_q.numel() - 1, total_q, q.shape[-2], n_blocks, n_splits,
            capacity(k_cache, block_table), params.new_keys, 0 if rotary_cos is None else rotary_cos.shape[0],
            params.softmax_scale, params.softcap, *_window(params),
            GROUP=q.shape[-2] // k_cache.shape[2], BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
            PAGE=0 if block_table is None else k_cache.shape[1], PACKED=cu_seqlens_q is not None, SPLIT=n_splits > 1,
            HAS_LEFT=params.window_left >= 0, HAS_RIGHT=_has_right(q, params), HAS_SOFTCAP=params.softcap > 0,
            ROTARY_DIM=0 if rotary_cos is None else 2 * rotary_cos.shape[1], INTERLEAVED=params.rotary_interleaved,
            num_warps=tile.num_warps, num_stages=tile.num_stages, **sizes,
        )  # fmt: skip
        if n_splits > 1:
            launch.run(
                attention_kvcache_combine_kernel, (out.numel() // q.shape[-1],),
                parts, largest, total, out, lse, sinks, total_q, q.shape[-2], n_splits,
                BLOCK_S=configs.COMBINE_SPLITS, num_warps=configs.COMBINE_WARPS, **sizes,
            )  # fmt: skip
    return out, lse


def _dense(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _block_d(q: torch.Tensor) -> int:
    return max(16, launch.next_power_of_2(q.shape[-1]))


def _plan(q, k_cache, block_table, cu_seqlens_q, params) -> tuple[configs.Tile, int, int]:
    """The tile, the blocks of rows of one key head (of one sequence of a dense batch), and the number of splits."""
    group = q.shape[-2] // k_cache.shape[2]
    longest_q = q.shape[-3] if params.max_seqlen_q < 0 else params.max_seqlen_q
    device = Device.of(q.device)
    tile = configs.tile(device, _block_d(q), q.element_size(), longest_q * group)
    if cu_seqlens_q is None:
        n_blocks = launch.cdiv(longest_q * group, tile.block_m)
        programs = n_blocks * q.shape[0] * k_cache.shape[2]
    else:
        n_blocks = q.shape[0] * group // tile.block_m + cu_seqlens_q.numel()
        programs = n_blocks * k_cache.shape[2]
    seen = capacity(k_cache, block_table)
    if params.window_left >= 0 and params.window_right >= 0:
        seen = min(seen, params.window_left + params.window_right + launch.cdiv(tile.block_m, group))
    slots = launch.multiprocessors(q) * tile.programs
    n_splits = params.num_splits or configs.splits(programs, slots, launch.cdiv(seen, tile.block_n))
    return tile, n_blocks, n_splits


def _window(params) -> tuple[int, int]:
    return min(params.window_left, 2**30), min(params.window_right, 2**30)  # positions are added to it in 32 bits


def _has_right(q: torch.Tensor, params) -> bool:
    only_query = q.dim() == 4 and q.shape[1] == 1  # it stands at the last key, so there is none to its right
    return params.window_right >= 0 and not only_query
