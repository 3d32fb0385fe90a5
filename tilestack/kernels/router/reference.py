"""router in plain torch: the definition."""

from __future__ import annotations

import torch

from tilestack.kernels.dispatch import Call
from tilestack.kernels.reference_autograd import gradients

AUXILIARY = ()
SAVED = ("logits", "token_mask")


def refuses(call: Call) -> str | None:
    return None


def compute(logits: torch.Tensor, token_mask: torch.Tensor | None, params) -> tuple[torch.Tensor, ...]:
    tokens, experts = logits.shape
    wide = torch.promote_types(logits.dtype, torch.float32)
    probability = torch.softmax(logits, -1, dtype=wide)
    # chosen by logits, which are exact, and by a stable sort: torch.topk leaves the order of equal ones open
    topk_ids = logits.detach().sort(dim=-1, descending=True, stable=True).indices[:, : params.top_k].contiguous()
    topk_weights = probability.gather(1, topk_ids)
    if params.normalize:
        topk_weights = topk_weights / topk_weights.sum(-1, keepdim=True)
    counted = logits.new_ones(tokens, dtype=wide) if token_mask is None else token_mask.to(wide)
    routes = counted[:, None].expand(tokens, params.top_k).reshape(-1)
    tokens_per_expert = logits.new_zeros(experts, dtype=wide).index_add(0, topk_ids.reshape(-1), routes)
    probability_sum = (probability * counted[:, None]).sum(0)
    z_sum = (torch.logsumexp(logits.to(wide), -1).square() * counted).sum()
    return topk_weights, topk_ids.int(), tokens_per_expert, probability_sum, z_sum


def forward(logits, token_mask, params):
    return compute(logits, token_mask, params)


def backward(dtopk_weights, dtopk_ids, dtokens, dprobability_sum, dz_sum, logits, token_mask, *, needs, params):
    grads = (dtopk_weights, None, None, dprobability_sum, dz_sum)
    return gradients(compute, {"logits": logits, "token_mask": token_mask}, grads, needs, params)
