"""The LM head and the loss in one: cross entropy of hidden @ weight.T without the [T, V] logits. The contract.

    loss[t] = logsumexp(logits[t]) - logits[t, labels[t]],   logits = hidden @ weight.T

as transformers computes it: logits in the inputs' dtype, then everything in float32. Where no label counts, "mean" is
0 with zero gradients (torch and transformers give NaN there): a micro-batch or a rank whose documents are all masked
must not destroy the step.

Sources: Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models" (2024), eq. 1-2, for the problem; Hsu et
al., "Liger Kernel" (2024), section 3.2, for gradients in the forward pass over chunks of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tilestack.kernels import checks
from tilestack.kernels.dispatch import Op, portable, reference
from tilestack.kernels.registration import Contract

REDUCTIONS = ("mean", "sum", "none")


@dataclass(frozen=True)
class LinearCrossEntropyParams:
    """hidden_gradient, weight_gradient: backward will ask for them, so forward may prepare them."""

    ignore_index: int
    reduction: str
    hidden_gradient: bool
    weight_gradient: bool


def _fake(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    num_items: torch.Tensor | None,
    params: LinearCrossEntropyParams,
) -> tuple:
    shape = labels.shape if params.reduction == "none" else ()
    return (hidden.new_empty(shape, dtype=torch.promote_types(hidden.dtype, torch.float32)),)


CONTRACT = Contract(
    "linear_cross_entropy", ("hidden", "weight", "labels", "num_items?"), ("loss",), LinearCrossEntropyParams, _fake
)
OP = Op(CONTRACT, (portable("linear_cross_entropy"), reference("linear_cross_entropy")))


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_items: float | torch.Tensor | None = None,
    implementation: str | None = None,
) -> torch.Tensor:
    """Cross entropy of `hidden @ weight.T` against `labels`; the logits of all tokens never exist at once.

    hidden: [T, H], floating point, any strides.
    weight: [V, H], the dtype of hidden.
    labels: [T], int64, each in [0, V) or equal to ignore_index. Nothing is shifted here. A label out of range raises
        IndexError on a CPU. On a GPU, where looking would wait for the device, it makes the loss and the gradients
        NaN ("tilestack-triton") or fails torch's device-side assertion ("reference").
    ignore_index: tokens with this label have loss 0 and no gradient.
    reduction: "mean" divides the sum by the number of labels that count, "sum" does not divide, "none" gives one loss
        a token.
    num_items: what "mean" divides by instead: a number, or a tensor of one element on hidden's device, which is never
        read on the host. For the mean over a global batch: the labels that count in all micro-batches and ranks.
        A divisor of 0 counts as 1.
    implementation: "tilestack-triton" or "reference"; None chooses.

    Returns the loss, float32 (float64 for float64 inputs): a scalar, or [T] for "none". Differentiable in hidden and
    weight. Raises ValueError for wrong shapes, dtypes, devices or options.
    """
    op = "linear_cross_entropy"
    checks.floating(op, hidden=hidden)
    checks.same_dtype(op, hidden=hidden, weight=weight)
    checks.dtype(op, "labels", labels, torch.int64)
    checks.rank(op, "hidden", hidden, (2,), "[T, H] (flatten batch and sequence)")
    checks.rank(op, "weight", weight, (2,), "[V, H]")
    checks.shape(op, "weight", weight, (weight.shape[0], hidden.shape[1]), "[V, H], H the last dimension of hidden")
    checks.shape(op, "labels", labels, (hidden.shape[0],), "[T], T the first dimension of hidden")
    checks.at_least(op, "V (the rows of weight)", weight.shape[0], 1)
    checks.at_least(op, "H (the columns of weight)", weight.shape[1], 1)
    if reduction not in REDUCTIONS:
        raise ValueError(f"{op}: reduction must be one of {', '.join(map(repr, REDUCTIONS))}, got {reduction!r}")
    num_items = _divisor(num_items, reduction, hidden)
    checks.same_device(op, hidden=hidden, weight=weight, labels=labels, num_items=num_items)
    recording = torch.is_grad_enabled()
    params = LinearCrossEntropyParams(
        ignore_index, reduction, recording and hidden.requires_grad, recording and weight.requires_grad
    )
    return OP((hidden, weight, labels, num_items), params, implementation)[0]


def _divisor(num_items: float | torch.Tensor | None, reduction: str, hidden: torch.Tensor) -> torch.Tensor | None:
    """num_items as a scalar tensor on the device, without waiting for it."""
    if num_items is None:
        return None
    if reduction != "mean":
        raise ValueError(f"linear_cross_entropy: num_items is the divisor of reduction='mean', got {reduction!r}")
    if torch.is_tensor(num_items):
        if num_items.numel() != 1:
            raise ValueError(
                f"linear_cross_entropy: num_items must be a number or one element, got {list(num_items.shape)}"
            )
        return num_items.detach().reshape(())
    checks.at_least("linear_cross_entropy", "num_items", num_items, 0)
    return torch.full((), num_items, dtype=torch.float64, device=hidden.device)
