"""Attention for Hopper (sm_90): what it covers. The kernels are in sm90_forward.py and sm90_backward.py."""

from __future__ import annotations

import torch

from tilestack.kernels.attention.features import SINKS, SOFTCAP, refuses_features
from tilestack.kernels.attention.sm90_backward import backward
from tilestack.kernels.attention.sm90_configs import FORWARD
from tilestack.kernels.attention.sm90_forward import forward
from tilestack.kernels.dispatch import Call

__all__ = ["AUXILIARY", "SAVED", "backward", "forward", "refuses"]

AUXILIARY = ()
WITH_GRADIENTS = (64, 128)  # head dimensions of the backward
SAVED = ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "out", "lse")


def refuses(call: Call) -> str | None:
    head_dim = call.shape("q")[-1]
    if call.dtype("q") not in (torch.bfloat16, torch.float16):
        return f"is for bfloat16 and float16, got {call.dtype('q')}"
    if head_dim > max(FORWARD):
        return f"is for head dimensions up to {max(FORWARD)}, got {head_dim}"
    if call.needs_grad and head_dim not in WITH_GRADIENTS:
        return f"has gradients for head dimensions {', '.join(map(str, WITH_GRADIENTS))}, got {head_dim}"
    missing = refuses_features(call, () if call.needs_grad else (SOFTCAP, SINKS))
    if missing:
        return missing
    if call.params.deterministic and call.needs_grad:
        return "adds dq, dk and dv in no fixed order, and deterministic=True was asked for"
    *rows, heads, _ = call.shape("q")
    if torch.Size(rows).numel() * heads * 2 >= 2**31:
        return "counts queries times heads in 32 bits"
    if call.tensors["cu_seqlens_q"] is not None and call.needs_grad:
        return _refuses_short_documents(call.shape("cu_seqlens_q")[0] - 1, rows[0])
    return None


def _refuses_short_documents(documents: int, queries: int) -> str | None:
    # the backward keeps float32 dQ in blocks of 64 queries that begin with each document
    if documents > 1024 and queries < 32 * documents:
        return f"keeps 64 queries of scratch for each document, too much for {documents} of {queries} queries in all"
    return None
