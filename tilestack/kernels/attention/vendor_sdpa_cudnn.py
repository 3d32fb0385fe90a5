"""cuDNN's attention, through the aten operators under scaled_dot_product_attention."""

from __future__ import annotations

import torch

from tilestack.kernels.attention.vendor_common import Abilities, heads_first, heads_last, wanted

AUXILIARY = ()
SAVED = ("q", "k", "v", "out", "lse")
ABILITIES = Abilities(max_head_dim=128, single_rows=False)
refuses = ABILITIES.refuses


def forward(q, k, v, cu_seqlens_q, cu_seqlens_k, sinks, alibi_slopes, dropout_seed, params):
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        heads_first(q), heads_first(k), heads_first(v), None, True, 0.0, params.causal, False,
        scale=params.softmax_scale,
    )  # fmt: skip
    return heads_last(out), lse.reshape(lse.shape[:3])


def backward(dout, dlse, q, k, v, out, lse, *, needs, params):
    no_dropout = lse.new_zeros((), dtype=torch.int64)
    gradients = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        heads_first(dout), heads_first(q), heads_first(k), heads_first(v), heads_first(out), lse.unsqueeze(-1),
        no_dropout, no_dropout, None, None, None, q.shape[1], k.shape[1], 0.0, params.causal,
        scale=params.softmax_scale,
    )  # fmt: skip
    return wanted(needs, *[heads_last(each) for each in gradients])
