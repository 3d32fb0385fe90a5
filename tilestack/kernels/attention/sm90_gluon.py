"""Attention for Hopper (sm_90): what it covers. The kernels: sm90_forward.py, sm90_backward_kernel.py."""

from __future__ import annotations

import torch

from tilestack.kernels.attention.features import SINKS, SOFTCAP, refuses_features
from tilestack.kernels.attention.sm90_backward import backward
from tilestack.kernels.attention.sm90_configs import DETERMINISTIC_UP_TO, FORWARD, adds_in_turn
from tilestack.kernels.attention.sm90_forward import forward
from tilestack.kernels.dispatch import Call

__all__ = ["AUXILIARY", "SAVED", "backward", "forward", "refuses"]

AUXILIARY = ()
SAVED = ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "sinks", "out", "lse")


def refuses(call: Call) -> str | None:
    head_dim = call.shape("q")[-1]
    if call.dtype("q") not in (torch.bfloat16, torch.float16):
        return f"is for bfloat16 and float16, got {call.dtype('q')}"
    if head_dim > max(FORWARD):
        return f"is for head dimensions up to {max(FORWARD)}, got {head_dim}"
    missing = refuses_features(call, (SOFTCAP, SINKS))
    if missing:
        return missing
    *rows, heads, _ = call.shape("q")
    group = heads // call.shape("k")[-2]
    in_turn = adds_in_turn(call.params.deterministic, call.params.deterministic_keys, group)
    if call.needs_grad and in_turn and head_dim > DETERMINISTIC_UP_TO:
        return f"has no shared memory left to order dq with head dimensions over {DETERMINISTIC_UP_TO}, got {head_dim}"
    if torch.Size(rows).numel() * heads * 2 >= 2**31:
        return "counts queries times heads in 32 bits"
    return None
