"""flash-attn 2.8.3 (Dao-AILab): dense and packed, causal, window, grouped queries.

It counts packed documents' blocks from a maximum length; where the caller gave none, from the number of tokens.
"""

from __future__ import annotations

import sys

import torch

from tilestack.kernels.attention.features import SOFTCAP
from tilestack.kernels.attention.vendor_common import (
    Abilities,
    longest,
    lse_for_flash_attn,
    lse_of_flash_attn,
    readable,
    wanted,
)  # fmt: skip
from tilestack.kernels.dispatch import Call

AUXILIARY = ()
SAVED = ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "out", "lse")
ABILITIES = Abilities(
    max_head_dim=256,
    packed=True,
    window=True,
    uneven_causal=True,
    deterministic=True,
    deterministic_packed=True,
    features=(SOFTCAP,),
)


def refuses(call: Call) -> str | None:
    module = sys.modules.get("flash_attn")
    if module is not None and module.__name__ != "flash_attn":
        return f"flash_attn is an alias of {module.__name__} in this process, not the package"
    return ABILITIES.refuses(call)


def forward(q, k, v, cu_seqlens_q, cu_seqlens_k, sinks, alibi_slopes, dropout_seed, params):
    from flash_attn import flash_attn_interface

    q, k, v = (readable(each) for each in (q, k, v))
    shared = {**_options(params), "return_softmax": False}
    if cu_seqlens_q is None:
        out, lse, *_ = flash_attn_interface._flash_attn_forward(q, k, v, **shared)
    else:
        packing = _packing(q, k, cu_seqlens_q, cu_seqlens_k, params)
        # zero_tensors: rows after the last document are 0 and their lse -inf, not whatever was in memory
        out, lse, *_ = flash_attn_interface._flash_attn_varlen_forward(q, k, v, **packing, **shared, zero_tensors=True)
    return out, lse_of_flash_attn(lse)


def backward(dout, dlse, q, k, v, cu_seqlens_q, cu_seqlens_k, out, lse, *, needs, params):
    from flash_attn import flash_attn_interface

    dout, q, k, v = (readable(each) for each in (dout, q, k, v))
    saved = (dout, q, k, v, out, lse_for_flash_attn(lse))
    shared = {**_options(params), "deterministic": params.deterministic}
    if cu_seqlens_q is None:
        gradients = [torch.empty_like(each, memory_format=torch.contiguous_format) for each in (q, k, v)]
        flash_attn_interface._flash_attn_backward(*saved, *gradients, **shared)
    else:
        gradients = [torch.zeros_like(each, memory_format=torch.contiguous_format) for each in (q, k, v)]
        packing = _packing(q, k, cu_seqlens_q, cu_seqlens_k, params)
        flash_attn_interface._flash_attn_varlen_backward(*saved, *gradients, **packing, **shared)
    return wanted(needs, *gradients)


def _options(params) -> dict:
    return {
        "dropout_p": 0.0,
        "softmax_scale": params.softmax_scale,
        "causal": params.causal,
        "window_size_left": params.window_left,
        "window_size_right": params.window_right,
        "softcap": params.softcap,
        "alibi_slopes": None,
    }


def _packing(q, k, cu_seqlens_q, cu_seqlens_k, params) -> dict:
    return {
        "cu_seqlens_q": cu_seqlens_q,
        "cu_seqlens_k": cu_seqlens_k,
        "max_seqlen_q": longest(params.max_seqlen_q, q.shape[0]),
        "max_seqlen_k": longest(params.max_seqlen_k, k.shape[0]),
    }
