"""xFormers 0.0.35, its flash-attention operators: dense and packed, causal, head dimensions to 128 (README.md has why).

Its block-diagonal masks hold the documents' lengths on the host: packed input waits for the device, twice a step.
The operator is pinned: another one that xFormers might pick has its lse in another layout.
"""

from __future__ import annotations

import torch

from tilestack.kernels.attention.layout import empty_lse
from tilestack.kernels.attention.vendor_common import (
    Abilities,
    lse_for_flash_attn,
    lse_of_flash_attn,
    readable,
    wanted,
)  # fmt: skip

AUXILIARY = ()
SAVED = ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "out", "lse")
ABILITIES = Abilities(max_head_dim=128, packed=True, uneven_causal=True, grouped=False)
refuses = ABILITIES.refuses


def forward(q, k, v, cu_seqlens_q, cu_seqlens_k, sinks, alibi_slopes, dropout_seed, params):
    from xformers.ops import fmha

    def run(q, k, v, bias):
        out, lse = fmha.memory_efficient_attention_forward_requires_grad(
            q, k, v, bias, scale=params.softmax_scale, op=fmha.flash.FwOp
        )
        return out, lse_of_flash_attn(lse)

    q, k, v = (readable(each) for each in (q, k, v))
    if cu_seqlens_q is None:
        return run(q, k, v, _dense_bias(fmha, params))
    out, lse = torch.zeros_like(q, memory_format=torch.contiguous_format), empty_lse(q).fill_(-torch.inf)
    lengths_q, lengths_k = _lengths(cu_seqlens_q), _lengths(cu_seqlens_k)
    rows, columns = sum(lengths_q), sum(lengths_k)
    if rows and columns:
        bias = _packed_bias(fmha, lengths_q, lengths_k, q.device, params)
        found, found_lse = run(q[None, :rows], k[None, :columns], v[None, :columns], bias)
        out[:rows], lse[:, :rows] = found[0], found_lse[0]
    return out, lse


def backward(dout, dlse, q, k, v, cu_seqlens_q, cu_seqlens_k, out, lse, *, needs, params):
    from xformers.ops import fmha

    def run(dout, out, lse, q, k, v, bias):
        return fmha.memory_efficient_attention_backward(
            dout, out, lse_for_flash_attn(lse), q, k, v, bias, scale=params.softmax_scale, op=fmha.flash.BwOp
        )

    dout, q, k, v = (readable(each) for each in (dout, q, k, v))
    if cu_seqlens_q is None:
        gradients = run(dout, out, lse, q, k, v, _dense_bias(fmha, params))
        return wanted(needs, *[each.contiguous() for each in gradients])
    gradients = [torch.zeros_like(each, memory_format=torch.contiguous_format) for each in (q, k, v)]
    lengths_q, lengths_k = _lengths(cu_seqlens_q), _lengths(cu_seqlens_k)
    rows, columns = slice(sum(lengths_q)), slice(sum(lengths_k))
    if rows.stop and columns.stop:
        bias = _packed_bias(fmha, lengths_q, lengths_k, q.device, params)
        found = run(
            dout[None, rows], out[None, rows], lse[None, :, rows].contiguous(),
            q[None, rows], k[None, columns], v[None, columns], bias,
        )  # fmt: skip
        for gradient, each, part in zip(gradients, found, (rows, columns, columns), strict=True):
            gradient[part] = each[0]
    return wanted(needs, *gradients)


def _dense_bias(fmha, params):
    return fmha.attn_bias.LowerTriangularFromBottomRightMask() if params.causal else None


def _packed_bias(fmha, lengths_q: list[int], lengths_k: list[int], device: torch.device, params):
    bias = fmha.attn_bias.BlockDiagonalMask.from_seqlens(lengths_q, lengths_k, device=device)
    return bias.make_causal_from_bottomright() if params.causal else bias


def _lengths(cu_seqlens: torch.Tensor) -> list[int]:
    return cu_seqlens.diff().tolist()
