"""The memory-efficient attention inside torch (CUTLASS), through the aten operators under scaled_dot_product_attention.

Its lse is padded to a multiple of 32 queries, and backward wants it back like that. It takes float32 too, but its dq
then has three times the error of eager (H100, torch 2.11), over the rule of testing/compare.py: not used here.
"""

from __future__ import annotations

import torch

from tilestack.kernels.attention.vendor_common import Abilities, heads_first, heads_last, wanted

AUXILIARY = ("padded_lse",)
SAVED = ("q", "k", "v", "out", "padded_lse")
ABILITIES = Abilities(max_head_dim=None, grouped=False)
refuses = ABILITIES.refuses


def fake_auxiliary(q, *rest):
    batch, length, heads, _ = q.shape
    return (q.new_empty((batch, heads, -(-length // 32) * 32), dtype=torch.float32),)


def forward(q, k, v, cu_seqlens_q, cu_seqlens_k, sinks, alibi_slopes, dropout_seed, params):
    out, padded_lse, _, _ = torch.ops.aten._scaled_dot_product_efficient_attention(
        heads_first(q), heads_first(k), heads_first(v), None, True, 0.0, params.causal, scale=params.softmax_scale
    )
    return heads_last(out), padded_lse[..., : q.shape[1]].clone(memory_format=torch.contiguous_format), padded_lse


def backward(dout, dlse, q, k, v, out, padded_lse, *, needs, params):
    no_dropout = padded_lse.new_zeros((), dtype=torch.int64)
    *gradients, _ = torch.ops.aten._scaled_dot_product_efficient_attention_backward(
        heads_first(dout), heads_first(q), heads_first(k), heads_first(v), None, heads_first(out), padded_lse,
        no_dropout, no_dropout, 0.0, [True, True, True, False], params.causal, scale=params.softmax_scale,
    )  # fmt: skip
    return wanted(needs, *[heads_last(each) for each in gradients])
