"""Attention in plain torch: the definition, as eager attention in transformers computes it.

Scores are rounded to the dtype of q, the softmax is float32 inside, the probabilities are rounded again before they
meet v. Only lse is kept: backward computes the probabilities anew. Packed input is a loop over the documents, for which
the offsets are read on the host: on a GPU this waits for the device.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from tilestack.kernels.attention.layout import empty_lse
from tilestack.kernels.dispatch import Call

AUXILIARY = ()
SAVED = ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "lse")


def refuses(call: Call) -> str | None:
    return None


def forward(q, k, v, cu_seqlens_q, cu_seqlens_k, params):
    if cu_seqlens_q is None:
        return _forward(q, k, v, params)
    out, lse = torch.zeros_like(q, memory_format=torch.contiguous_format), empty_lse(q).fill_(-torch.inf)
    for rows, columns in _documents(cu_seqlens_q, cu_seqlens_k):
        document = _forward(q[None, rows], k[None, columns], v[None, columns], params)
        out[rows], lse[:, rows] = document[0][0], document[1][0]
    return out, lse


def backward(dout, dlse, q, k, v, cu_seqlens_q, cu_seqlens_k, lse, *, needs, params):
    if cu_seqlens_q is None:
        dq, dk, dv = _backward(dout, q, k, v, lse, params)
    else:
        dq, dk, dv = (torch.zeros_like(each, memory_format=torch.contiguous_format) for each in (q, k, v))
        for rows, columns in _documents(cu_seqlens_q, cu_seqlens_k):
            document = _backward(
                dout[None, rows], q[None, rows], k[None, columns], v[None, columns], lse[None, :, rows], params
            )
            dq[rows], dk[columns], dv[columns] = (each[0] for each in document)
    found = {"q": dq, "k": dk, "v": dv}
    return tuple(found[name] for name in needs)


def _documents(cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor) -> Iterator[tuple[slice, slice]]:
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for index in range(len(starts_q) - 1):
        yield slice(*starts_q[index : index + 2]), slice(*starts_k[index : index + 2])


def _forward(q, k, v, params):
    if k.shape[1] == 0:
        return torch.zeros_like(q, memory_format=torch.contiguous_format), empty_lse(q).fill_(-torch.inf)
    q, k, v, group = _by_kv_head(q, k, v)
    scores = _scores(q, k, group, params)
    largest = scores.amax(-1, keepdim=True)
    weights = scores.sub_(largest.masked_fill(largest == -torch.inf, 0)).exp_()  # a query may see no key
    total = weights.sum(-1, keepdim=True)
    out = weights.div_(total.clamp_min(1)).to(v.dtype) @ v  # the largest weight is 1, unless there is none
    lse = largest + total.log()
    return _by_query_head(out, group).transpose(1, 2).contiguous(), _by_query_head(lse, group)[..., 0].contiguous()


def _backward(dout, q, k, v, lse, params):
    """dv = P' dout; dS = P dP - P sum_j P dP, dP = dout v'; dq = scale dS k; dk = scale dS' q."""
    q, k, v, group = _by_kv_head(q, k, v)
    dout = dout.transpose(1, 2).reshape(q.shape)
    probabilities = _probabilities(_scores(q, k, group, params), lse.reshape(q.shape[:-1]))
    dv = probabilities.to(v.dtype).mT @ dout
    dscores = (dout @ v.mT).to(probabilities.dtype).mul_(probabilities)  # in place: new memory costs more than sums
    dscores.addcmul_(probabilities, dscores.sum(-1, keepdim=True), value=-1)
    dscores = dscores.to(q.dtype).mul_(params.softmax_scale)
    gradients = _by_query_head(dscores @ k, group), dscores.mT @ q, dv
    return tuple(each.transpose(1, 2).contiguous() for each in gradients)


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


def _scores(q: torch.Tensor, k: torch.Tensor, group: int, params) -> torch.Tensor:
    scores = (q @ k.mT).mul_(params.softmax_scale)
    scores = scores.to(torch.promote_types(q.dtype, torch.float32))
    if params.window_left < 0 and params.window_right < 0:
        return scores
    length_q, length_k = q.shape[-2] // group, k.shape[-2]
    hidden = _hidden(length_q, length_k, params, q.device)
    by_head = scores.view(*scores.shape[:2], group, length_q, length_k)
    return by_head.masked_fill_(hidden, -torch.inf).view(scores.shape)


def _hidden(length_q: int, length_k: int, params, device: torch.device) -> torch.Tensor:
    """[Sq, Sk]: True where the query must not see the key."""
    own = torch.arange(length_q, device=device)[:, None] + length_k - length_q
    keys = torch.arange(length_k, device=device)
    hidden = torch.zeros(length_q, length_k, dtype=torch.bool, device=device)
    if params.window_left >= 0:
        hidden |= keys < own - params.window_left
    if params.window_right >= 0:
        hidden |= keys > own + params.window_right
    return hidden


def _probabilities(scores: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    lse = lse.masked_fill(lse == -torch.inf, torch.inf)  # a query that sees no key: every probability is 0
    return scores.sub_(lse[..., None]).exp_()
