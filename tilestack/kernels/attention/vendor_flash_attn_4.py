"""flash-attn-4 (Dao-AILab, CuTe DSL; 4.0.0b36): dense and packed, causal, window, grouped queries, Hopper and newer."""

from __future__ import annotations

import torch

from tilestack.kernels.attention.features import SOFTCAP
from tilestack.kernels.attention.layout import empty_lse
from tilestack.kernels.attention.vendor_common import Abilities, longest, readable, wanted

AUXILIARY = ()
SAVED = ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "out", "lse")
ABILITIES = Abilities(
    max_head_dim=256, packed=True, window=True, uneven_causal=True, deterministic=True, features=(SOFTCAP,)
)
refuses = ABILITIES.refuses


def forward(q, k, v, cu_seqlens_q, cu_seqlens_k, sinks, alibi_slopes, dropout_seed, params):
    from flash_attn.cute.interface import _flash_attn_fwd

    q, k, v = (readable(each) for each in (q, k, v))
    arguments = _options(params)
    if cu_seqlens_q is not None:  # rows after the last document are never written
        arguments |= _packing(q, k, cu_seqlens_q, cu_seqlens_k, params)
        arguments["out"] = torch.zeros_like(q, memory_format=torch.contiguous_format)
        arguments["lse"] = empty_lse(q).fill_(-torch.inf)
    out, lse, *_ = _flash_attn_fwd(q, k, v, **arguments, return_lse=True)
    return out, lse


def backward(dout, dlse, q, k, v, cu_seqlens_q, cu_seqlens_k, out, lse, *, needs, params):
    from flash_attn.cute.interface import _flash_attn_bwd

    dout, q, k, v = (readable(each) for each in (dout, q, k, v))
    arguments = {**_options(params), "deterministic": params.deterministic or params.deterministic_keys}
    if cu_seqlens_q is not None:
        arguments |= _packing(q, k, cu_seqlens_q, cu_seqlens_k, params)
        for name, tensor in (("dq", q), ("dk", k), ("dv", v)):
            arguments[name] = torch.zeros_like(tensor, memory_format=torch.contiguous_format)
    dq, dk, dv, *_ = _flash_attn_bwd(q, k, v, out, dout, lse, **arguments)
    return wanted(needs, dq, dk, dv)


def _options(params) -> dict:
    def side(width: int) -> int | None:
        return None if width < 0 else width

    options = {
        "softmax_scale": params.softmax_scale,
        "causal": params.causal,
        "window_size_left": side(params.window_left),
        "window_size_right": side(params.window_right),
    }
    return options | {"softcap": params.softcap} if params.softcap else options  # forward and backward disagree on none


def _packing(q, k, cu_seqlens_q, cu_seqlens_k, params) -> dict:
    return {
        "cu_seqlens_q": cu_seqlens_q,
        "cu_seqlens_k": cu_seqlens_k,
        "max_seqlen_q": longest(params.max_seqlen_q, q.shape[0]),
        "max_seqlen_k": longest(params.max_seqlen_k, k.shape[0]),
    }
