"""Attention in Triton: the host side. The kernels are in triton_forward.py and triton_backward.py.

Dense and packed input run the same kernels. Blocks of packed documents are found on the device, in cu_seqlens, so that
nothing is read on the host; max_seqlen chooses a tile and no grid.
"""

from __future__ import annotations

import torch

from tilestack.kernels import launch
from tilestack.kernels.attention import configs, dropout
from tilestack.kernels.attention.features import sink_gradient
from tilestack.kernels.attention.layout import empty_lse
from tilestack.kernels.attention.triton_backward import attention_bwd_dk_dv_kernel, attention_bwd_dq_kernel
from tilestack.kernels.attention.triton_forward import attention_fwd_kernel
from tilestack.kernels.device import Device
from tilestack.kernels.dispatch import Call

AUXILIARY = ()
SAVED = ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "sinks", "alibi_slopes", "dropout_seed", "out", "lse")
_MAX_ROW_STRIDE = 2**23  # times the rows of a tile: 32 bits


def refuses(call: Call) -> str | None:
    head_dim = call.shape("q")[-1]
    if call.dtype("q") == torch.float64:
        return "has no float64 path"
    if head_dim > configs.MAX_HEAD_DIM:
        return f"takes head dimensions up to {configs.MAX_HEAD_DIM}, got {head_dim}"
    return None


def forward(q, k, v, cu_seqlens_q, cu_seqlens_k, sinks, alibi_slopes, dropout_seed, params):
    q, k, v = (_readable(each) for each in (q, k, v))
    out, lse = q.new_empty(q.shape), empty_lse(q)
    slopes, seed, *numbers = _features(alibi_slopes, dropout_seed, params)
    tile = _tiles(q, params).forward
    blocks = _blocks(q, cu_seqlens_q, tile.block_m)
    if blocks * q.shape[-2]:
        with launch.on_device(q):
            launch.run(
                attention_fwd_kernel, _grid(q, blocks),
                q, k, v, out, lse, sinks, cu_seqlens_q, cu_seqlens_k, slopes, seed,
                *_strides(q), *_strides(k), *_strides(v), *_sizes(q, k, cu_seqlens_q), blocks, q.shape[-2],
                params.softmax_scale, params.window_left, params.window_right, *numbers,
                **_constants(q, k, tile, alibi_slopes, params),
            )  # fmt: skip
    return out, lse


def backward(
    dout, dlse, q, k, v, cu_seqlens_q, cu_seqlens_k, sinks, alibi_slopes, dropout_seed, out, lse, *, needs, params
):
    q, k, v, dout = (_readable(each) for each in (q, k, v, dout))
    dq, dk, dv, delta = (each.new_empty(each.shape) for each in (q, k, v, lse))
    slopes, seed, *numbers = _features(alibi_slopes, dropout_seed, params)
    strides = (*_strides(q), *_strides(k), *_strides(v), *_strides(dout))
    sizes = _sizes(q, k, cu_seqlens_q)
    scores = (params.softmax_scale, params.window_left, params.window_right, *numbers)
    tiles = _tiles(q, params)
    blocks_q = _blocks(q, cu_seqlens_q, tiles.dq.block_m)
    blocks_k = _blocks(k, cu_seqlens_k, tiles.dk_dv.block_n)
    with launch.on_device(q):
        if blocks_q:
            launch.run(
                attention_bwd_dq_kernel, _grid(q, blocks_q),
                q, k, v, out, dout, lse, delta, dq, cu_seqlens_q, cu_seqlens_k, slopes, seed, *strides, *sizes,
                blocks_q, q.shape[-2], *scores, **_constants(q, k, tiles.dq, alibi_slopes, params),
            )  # fmt: skip
        if blocks_k and ("k" in needs or "v" in needs):
            launch.run(
                attention_bwd_dk_dv_kernel, _grid(k, blocks_k),
                q, k, v, dout, lse, delta, dk, dv, cu_seqlens_q, cu_seqlens_k, slopes, seed, *strides, *sizes,
                blocks_k, k.shape[-2], *scores, **_constants(q, k, tiles.dk_dv, alibi_slopes, params),
            )  # fmt: skip
    found = {"q": dq, "k": dk, "v": dv}
    if "sinks" in needs:
        found["sinks"] = sink_gradient(sinks, lse, delta)
    return tuple(found[name] for name in needs)


def _features(alibi_slopes: torch.Tensor | None, dropout_seed: torch.Tensor | None, params) -> tuple:
    """Arguments of all kernels: slopes, seed, soft cap, stride of the slopes, threshold and factor of dropout."""
    stride = alibi_slopes.shape[1] if alibi_slopes is not None and alibi_slopes.dim() == 2 else 0
    rescale = 1 / (1 - params.dropout_p)
    return alibi_slopes, dropout_seed, params.softcap, stride, dropout.threshold(params.dropout_p), rescale


def _readable(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy where a head's rows are not contiguous or too far apart for 32-bit offsets in a tile."""
    near = tensor.stride(-1) == 1 and abs(tensor.stride(-3)) < _MAX_ROW_STRIDE
    return tensor if near else tensor.contiguous()


def _strides(tensor: torch.Tensor) -> tuple[int, int, int]:
    """Strides of batch, sequence and head; packed input has no batch."""
    return tensor.stride(0) if tensor.dim() == 4 else 0, tensor.stride(-3), tensor.stride(-2)


def _sizes(q: torch.Tensor, k: torch.Tensor, cu_seqlens: torch.Tensor | None) -> tuple[int, int, int]:
    n_documents = 0 if cu_seqlens is None else cu_seqlens.numel() - 1
    return n_documents, q.shape[-3], k.shape[-3]


def _blocks(own: torch.Tensor, cu_seqlens: torch.Tensor | None, block: int) -> int:
    """Blocks of one head (of one element of a dense batch): see triton_blocks.locate for the packed bound."""
    if cu_seqlens is None:
        return launch.cdiv(own.shape[-3], block)
    return own.shape[-3] // block + cu_seqlens.numel()


def _grid(own: torch.Tensor, blocks: int) -> tuple[int]:
    batch = own.shape[0] if own.dim() == 4 else 1
    return (blocks * own.shape[-2] * batch,)


def _tiles(q: torch.Tensor, params) -> configs.Tiles:
    longest_q = params.max_seqlen_q if params.max_seqlen_q >= 0 else q.shape[-3]
    return configs.tiles(Device.of(q.device), _block_d(q), q.element_size(), longest_q)


def _block_d(q: torch.Tensor) -> int:
    return max(16, launch.next_power_of_2(q.shape[-1]))


def _constants(q: torch.Tensor, k: torch.Tensor, tile: configs.Tile, alibi_slopes: torch.Tensor | None, params) -> dict:
    return {
        "GROUP": q.shape[-2] // k.shape[-2],
        "HEAD_DIM": q.shape[-1],
        "BLOCK_D": _block_d(q),
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "PACKED": q.dim() == 3,
        "HAS_LEFT": params.window_left >= 0,
        "HAS_RIGHT": params.window_right >= 0,
        "HAS_SOFTCAP": params.softcap > 0,
        "HAS_ALIBI": alibi_slopes is not None,
        "HAS_DROPOUT": params.dropout_p > 0,
        "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }
