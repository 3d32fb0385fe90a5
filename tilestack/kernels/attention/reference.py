"""Attention in plain torch: the definition, as eager attention in transformers computes it.

Scores are rounded to the dtype of q, the softmax is float32 inside, the probabilities are rounded again before they
meet v. Only lse is kept: backward computes the probabilities anew. Packed input is a loop over the documents, for which
the offsets are read on the host: on a GPU this waits for the device.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from tilestack.kernels.attention.dropout import dropout_mask
from tilestack.kernels.attention.features import lse_of_no_keys, sink_gradient
from tilestack.kernels.dispatch import Call

AUXILIARY = ()
SAVED = ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "sinks", "alibi_slopes", "dropout_seed", "out", "lse")


@dataclass(frozen=True)
class _Options:
    """What a call has beyond q, k and v; first: which of all sequences is the first of those at hand."""

    params: Any
    sinks: torch.Tensor | None
    alibi_slopes: torch.Tensor | None
    dropout_seed: torch.Tensor | None
    first: int = 0


def refuses(call: Call) -> str | None:
    return None


def forward(q, k, v, cu_seqlens_q, cu_seqlens_k, sinks, alibi_slopes, dropout_seed, params):
    options = _Options(params, sinks, alibi_slopes, dropout_seed)
    if cu_seqlens_q is None:
        return _forward(q, k, v, options)
    out, lse = torch.zeros_like(q, memory_format=torch.contiguous_format), lse_of_no_keys(q, sinks)
    for index, rows, columns in _documents(cu_seqlens_q, cu_seqlens_k):
        document = _forward(q[None, rows], k[None, columns], v[None, columns], replace(options, first=index))
        out[rows], lse[:, rows] = document[0][0], document[1][0]
    return out, lse


def backward(
    dout, dlse, q, k, v, cu_seqlens_q, cu_seqlens_k, sinks, alibi_slopes, dropout_seed, out, lse, *, needs, params
):  # fmt: skip
    options = _Options(params, sinks, alibi_slopes, dropout_seed)
    wide = lse.dtype
    delta = (out.to(wide) * dout.to(wide)).sum(-1).transpose(-1, -2).contiguous()
    if cu_seqlens_q is None:
        dq, dk, dv = _backward(dout, q, k, v, lse, delta, options)
    else:
        dq, dk, dv = (torch.zeros_like(each, memory_format=torch.contiguous_format) for each in (q, k, v))
        for index, rows, columns in _documents(cu_seqlens_q, cu_seqlens_k):
            document = _backward(
                dout[None, rows], q[None, rows], k[None, columns], v[None, columns], lse[None, :, rows],
                delta[None, :, rows], replace(options, first=index),
            )  # fmt: skip
            dq[rows], dk[columns], dv[columns] = (each[0] for each in document)
    found = {"q": dq, "k": dk, "v": dv}
    if "sinks" in needs:
        found["sinks"] = sink_gradient(sinks, lse, delta)
    return tuple(found[name] for name in needs)


def _documents(cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor) -> Iterator[tuple[int, slice, slice]]:
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for index in range(len(starts_q) - 1):
        yield index, slice(*starts_q[index : index + 2]), slice(*starts_k[index : index + 2])


def _forward(q, k, v, options):
    if k.shape[1] == 0:
        return torch.zeros_like(q, memory_format=torch.contiguous_format), lse_of_no_keys(q, options.sinks)
    q, k, v, group = _by_kv_head(q, k, v)
    scores, _ = _scores(q, k, group, options)
    largest = scores.amax(-1, keepdim=True)
    if options.sinks is not None:
        sink = options.sinks.to(scores.dtype).repeat_interleave(q.shape[2] // group).view(q.shape[1], -1, 1)
        largest = torch.maximum(largest, sink)
    finite = largest.masked_fill(largest == -torch.inf, 0)  # a query may see no key
    weights = scores.sub_(finite).exp_()
    total = weights.sum(-1, keepdim=True)
    if options.sinks is not None:
        total += (sink - finite).exp_()
    probabilities = weights.div_(total.clamp_min(1))  # the largest weight is 1, unless there is none
    out = _dropped(probabilities, group, options).to(v.dtype) @ v
    lse = largest + total.log()
    return _by_query_head(out, group).transpose(1, 2).contiguous(), _by_query_head(lse, group)[..., 0].contiguous()


def _backward(dout, q, k, v, lse, delta, options):
    """dv = D(P)' dout; dS = P (dP - delta), dP = D(dout v'), delta = rowsum(out dout); dq = scale dS k; dk likewise.

    D is dropout; behind a soft cap, dS is multiplied by its derivative. delta comes from out, not from the P at hand,
    so that out and lse may be those of more keys than k has. dP is not rounded: of a query that sees one key,
    dP - delta is 0, and rounding one of the two alone would leave a gradient where there is none.
    """
    q, k, v, group = _by_kv_head(q, k, v)
    dout = dout.transpose(1, 2).reshape(q.shape)
    scores, tanh = _scores(q, k, group, options)
    probabilities = _probabilities(scores, lse.reshape(q.shape[:-1]))
    dv = _dropped(probabilities, group, options).to(v.dtype).mT @ dout
    wide = probabilities.dtype
    dscores = _dropped(dout.to(wide) @ v.to(wide).mT, group, options)
    dscores = dscores.mul_(probabilities)  # in place: new memory costs more than sums
    dscores.addcmul_(probabilities, delta.reshape(*q.shape[:-1], 1), value=-1)
    if tanh is not None:
        dscores.mul_(1 - tanh.square())
    dscores = dscores.to(q.dtype).mul_(options.params.softmax_scale)
    gradients = _by_query_head(dscores @ k, group), dscores.mT @ q, dv
    return tuple(each.transpose(1, 2).contiguous() for each in gradients)


def scores(
    q: torch.Tensor, k: torch.Tensor, alibi_slopes: torch.Tensor | None, params: Any, first: int = 0
) -> torch.Tensor:
    """[B, Hq, Sq, Sk]: what the softmax of dense q and k is taken of, -inf where a query must not see a key.

    first: which of all sequences is the first, for slopes that differ between sequences.
    """
    q, k, _, group = _by_kv_head(q, k, k)
    found, _ = _scores(q, k, group, _Options(params, None, alibi_slopes, None, first))
    return _by_query_head(found, group)


def _by_kv_head(q, k, v):
    """[B, Sq, Hq, D] to [B, Hkv, group * Sq, D], so that the heads that share a key head are one product."""
    batch, length, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    group = heads // kv_heads
    q = q.transpose(1, 2).reshape(batch, kv_heads, group * length, head_dim)
    return q, k.transpose(1, 2), v.transpose(1, 2), group


def _by_query_head(tensor: torch.Tensor, group: int) -> torch.Tensor:
    """[B, Hkv, group * Sq, D] to [B, Hq, Sq, D]."""
    batch, kv_heads, rows, width = tensor.shape
    return tensor.reshape(batch, kv_heads * group, rows // group, width)


def _scores(q: torch.Tensor, k: torch.Tensor, group: int, options) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The scores, -inf where a query must not see a key, and the hyperbolic tangent of a soft cap."""
    params, tanh = options.params, None
    scores = (q @ k.mT).mul_(params.softmax_scale)
    scores = scores.to(torch.promote_types(q.dtype, torch.float32))
    if params.softcap > 0:
        tanh = scores.div_(params.softcap).tanh_()
        scores = tanh * params.softcap
    length_q, length_k = q.shape[-2] // group, k.shape[-2]
    own = torch.arange(length_q, device=q.device)[:, None] + length_k - length_q
    keys = torch.arange(length_k, device=q.device)
    by_head = scores.view(*scores.shape[:2], group, length_q, length_k)
    if options.alibi_slopes is not None:
        slopes = _slopes(options, q.shape[0]).to(scores.dtype)
        by_head -= slopes.view(slopes.shape[0], -1, group, 1, 1) * (own - keys).abs()
    hidden = _hidden(own, keys, params)
    if hidden is not None:
        by_head.masked_fill_(hidden, -torch.inf)
    return scores, tanh


def _slopes(options, batch: int) -> torch.Tensor:
    """[1 or B, Hq]: the slopes of the sequences at hand."""
    slopes = options.alibi_slopes
    return slopes[None] if slopes.dim() == 1 else slopes[options.first : options.first + batch]


def _hidden(own: torch.Tensor, keys: torch.Tensor, params) -> torch.Tensor | None:
    """[Sq, Sk]: True where the query must not see the key; None where all are seen."""
    hidden = None
    if params.window_left >= 0:
        hidden = keys < own - params.window_left
    if params.window_right >= 0:
        right = keys > own + params.window_right
        hidden = right if hidden is None else hidden.logical_or_(right)
    return hidden


def _probabilities(scores: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    lse = lse.masked_fill(lse == -torch.inf, torch.inf)  # a query that sees no key: every probability is 0
    return scores.sub_(lse[..., None]).exp_()


def _dropped(by_kv_head: torch.Tensor, group: int, options) -> torch.Tensor:
    """Probabilities, or their gradient, behind dropout: kept and divided by 1 - p, or 0."""
    dropout_p = options.params.dropout_p
    if not dropout_p:
        return by_kv_head
    batch, kv_heads, rows, length_k = by_kv_head.shape
    shape = (batch, kv_heads * group, rows // group, length_k)
    keep = dropout_mask(options.dropout_seed, dropout_p, *shape, options.first)
    return by_kv_head * keep.view(by_kv_head.shape) / (1 - dropout_p)
