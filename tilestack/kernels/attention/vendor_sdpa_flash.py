"""The flash-attention 2 inside torch, through the aten operators under scaled_dot_product_attention."""

from __future__ import annotations

import torch

from tilestack.kernels.attention.vendor_common import Abilities, heads_first, heads_last, wanted

AUXILIARY = ()
SAVED = ("q", "k", "v", "out", "lse")
ABILITIES = Abilities(max_head_dim=256)
refuses = ABILITIES.refuses


def forward(q, k, v, cu_seqlens_q, cu_seqlens_k, sinks, alibi_slopes, dropout_seed, params):
    out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
        heads_first(q), heads_first(k), heads_first(v), 0.0, params.causal, False, scale=params.softmax_scale
    )
    return heads_last(out), lse


def backward(dout, dlse, q, k, v, out, lse, *, needs, params):
    no_dropout = lse.new_zeros((2,), dtype=torch.int64).view(torch.uint64)
    gradients = torch.ops.aten._scaled_dot_product_flash_attention_backward(
        heads_first(dout), heads_first(q), heads_first(k), heads_first(v), heads_first(out), lse,
        None, None, q.shape[1], k.shape[1], 0.0, params.causal, no_dropout, no_dropout[:1],
        scale=params.softmax_scale,
    )  # fmt: skip
    return wanted(needs, *[heads_last(each) for each in gradients])
