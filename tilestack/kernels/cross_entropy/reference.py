"""cross_entropy in plain torch: the definition."""

from __future__ import annotations

import torch

from tilestack.kernels.dispatch import Call

AUXILIARY = ()
SAVED = ()


def refuses(call: Call) -> str | None:
    return None


def forward(logits, labels, lse, params):
    scaled = logits.to(torch.promote_types(logits.dtype, torch.float32)) * params.logit_scale
    lse = scaled.logsumexp(-1) if lse is None else lse.clone()
    column = labels - params.class_start
    is_here = (column >= 0) & (column < logits.shape[1])
    target = scaled.gather(1, column.clamp(0, logits.shape[1] - 1)[:, None])[:, 0]
    common = torch.zeros_like(lse) if params.is_shard else lse
    smoothed = params.label_smoothing * (common - scaled.sum(-1) / params.total_classes)
    losses = smoothed + is_here * (1 - params.label_smoothing) * (common - target)
    z_losses = params.lse_square_scale * common.square()
    counts = labels != params.ignore_index
    return torch.where(counts, losses + z_losses, 0), torch.where(counts, z_losses, 0), lse
