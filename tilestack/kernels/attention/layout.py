"""What the implementations of attention share about the shapes of their tensors."""

from __future__ import annotations

import torch


def empty_lse(q: torch.Tensor) -> torch.Tensor:
    """[B, Hq, Sq] for dense q, [Hq, Tq] for packed; float32, or float64 where q is."""
    *batch, length, heads, _ = q.shape
    return q.new_empty((*batch, heads, length), dtype=torch.promote_types(q.dtype, torch.float32))
