"""cross_entropy_gradient in plain torch: the definition."""

from __future__ import annotations

import torch

from tilestack.kernels.dispatch import Call


def refuses(call: Call) -> str | None:
    return None


def update(dlogits, logits, labels, lse, dlosses, params) -> None:
    logits = dlogits if logits is None else logits
    probabilities = (logits.to(lse.dtype) * params.logit_scale - lse[:, None]).exp()
    columns = torch.arange(logits.shape[1], device=logits.device) + params.class_start
    is_label = labels[:, None] == columns
    smoothing = params.label_smoothing
    wanted = is_label * (1 - smoothing) + smoothing / params.total_classes
    gradient = probabilities * (1 + 2 * params.lse_square_scale * lse[:, None]) - wanted
    upstream = torch.where(labels == params.ignore_index, 0, dlosses.to(lse.dtype)) * params.logit_scale
    dlogits.copy_(torch.where(upstream[:, None] == 0, 0, gradient * upstream[:, None]))
