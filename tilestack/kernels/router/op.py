"""The router of a mixture of experts: which experts a token goes to and with which weight. The contract.

    probability = softmax(logits)                    float32, over the E experts
    topk_ids = the K experts with the largest logits, the largest first; equal ones: the lower index first
    topk_weights = probability[topk_ids], divided by its sum if `normalize`

and three statistics over the tokens of `token_mask`: how often each expert was chosen and its summed probability, from
which the load-balancing loss of Fedus, Zoph and Shazeer, "Switch Transformers" (2021), eq. 4-6, is made, and the sum of
the squared logsumexp, from which the z-loss of Zoph et al., "ST-MoE" (2022), eq. 5, is made.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from tilestack.kernels import checks
from tilestack.kernels.dispatch import Op, portable, reference
from tilestack.kernels.registration import Contract


class RouterOutput(NamedTuple):
    """topk_weights [T, K] and topk_ids [T, K] int32; tokens_per_expert [E], probability_sum [E] and z_sum []."""

    topk_weights: torch.Tensor
    topk_ids: torch.Tensor
    tokens_per_expert: torch.Tensor
    probability_sum: torch.Tensor
    z_sum: torch.Tensor


@dataclass(frozen=True)
class RouterParams:
    top_k: int
    normalize: bool


def _fake(logits: torch.Tensor, token_mask: torch.Tensor | None, params: RouterParams) -> tuple:
    tokens, experts = logits.shape
    wide = torch.promote_types(logits.dtype, torch.float32)
    return (
        logits.new_empty((tokens, params.top_k), dtype=wide),
        logits.new_empty((tokens, params.top_k), dtype=torch.int32),
        logits.new_empty((experts,), dtype=wide),
        logits.new_empty((experts,), dtype=wide),
        logits.new_empty((), dtype=wide),
    )


CONTRACT = Contract(
    "router",
    ("logits", "token_mask?"),
    RouterOutput._fields,
    RouterParams,
    _fake,
    constants=("topk_ids", "tokens_per_expert"),
)
OP = Op(CONTRACT, (portable("router"), reference("router")))


def router(
    logits: torch.Tensor,
    *,
    top_k: int,
    normalize: bool = True,
    token_mask: torch.Tensor | None = None,
    implementation: str | None = None,
) -> RouterOutput:
    """Choose `top_k` experts for every token.

    logits: [T, E], floating point.
    top_k: K, from 1 to E.
    normalize: divide the K weights by their sum.
    token_mask: [T] bool, the tokens that the statistics count; None counts all. Every token is routed.
    implementation: "tilestack-triton" or "reference"; None chooses.

    Returns RouterOutput: topk_weights [T, K] float32, topk_ids [T, K] int32, tokens_per_expert [E], probability_sum [E]
    and z_sum [] float32 (float64 where logits are), the sum over tokens of logsumexp(logits)^2. Differentiable in
    logits through topk_weights, probability_sum and z_sum.
    Raises ValueError for wrong shapes, dtypes, devices or a top_k that is not from 1 to E.
    """
    checks.floating("router", logits=logits)
    checks.rank("router", "logits", logits, (2,), "[T, E]")
    if not 1 <= top_k <= logits.shape[1]:
        raise ValueError(f"router: top_k must be from 1 to the number of experts ({logits.shape[1]}), got {top_k}")
    if token_mask is not None:
        checks.dtype("router", "token_mask", token_mask, torch.bool)
        checks.shape("router", "token_mask", token_mask, (logits.shape[0],), "[T], T the rows of logits")
        checks.same_device("router", logits=logits, token_mask=token_mask)
    return RouterOutput(*OP((logits, token_mask), RouterParams(top_k, normalize), implementation))


def load_balancing_loss(
    tokens_per_expert: torch.Tensor, probability_sum: torch.Tensor, num_tokens: int | torch.Tensor
) -> torch.Tensor:
    """The load-balancing loss of Switch Transformers (2021), eq. 4-6: 1 * K where experts are used evenly.

    tokens_per_expert, probability_sum: [E], the router's statistics, summed over the layers.
    num_tokens: tokens that were counted times layers; a number, or a scalar tensor on the device.

    Returns E * sum(tokens_per_expert / n * probability_sum / n), a scalar: the value that transformers gives.
    Raises ValueError for wrong shapes.
    """
    checks.rank("load_balancing_loss", "tokens_per_expert", tokens_per_expert, (1,), "[E]")
    experts = tokens_per_expert.shape[0]
    checks.shape("load_balancing_loss", "probability_sum", probability_sum, (experts,), "[E], like tokens_per_expert")
    return experts * torch.sum((tokens_per_expert / num_tokens) * (probability_sum / num_tokens))


def router_z_loss(z_sum: torch.Tensor, num_tokens: int | torch.Tensor) -> torch.Tensor:
    """The z-loss of ST-MoE (2022), eq. 5: the mean over tokens of logsumexp(logits)^2, which keeps logits small.

    z_sum: [], the router's statistic, summed over the layers.
    num_tokens: tokens that were counted times layers; a number, or a scalar tensor on the device.

    Returns a scalar.
    Raises ValueError for a z_sum that is not a scalar.
    """
    checks.rank("router_z_loss", "z_sum", z_sum, (0,), "a scalar")
    return z_sum / num_tokens
