"""The LM head and the loss in one: cross entropy of hidden @ weight.T without the [T, V] logits. The contract.

    logits  = hidden @ weight.T,    softcap * tanh(logits / softcap) if there is a softcap
    lse     = logsumexp(logits)
    loss[t] = token_weights[t] * ((1 - s) * (lse - logits[t, labels[t]]) + s * (lse - mean(logits[t])) + z * lse^2)

with s = label_smoothing and z = z_loss, as transformers computes it: logits in the inputs' dtype, then everything in
float32. Where no label counts, "mean" is 0 with zero gradients (torch and transformers give NaN there): a micro-batch
or a rank whose documents are all masked must not destroy the step.

Sources: Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models" (2024), eq. 1-2, for the problem; Hsu et
al., "Liger Kernel" (2024), section 3.2, for gradients in the forward pass over chunks of tokens; Szegedy et al.,
"Rethinking the Inception Architecture" (2016), section 7, for label smoothing; Chowdhery et al., "PaLM" (2022), section
5, for the z-loss; the Gemma 2 report (2024), section 2, for the softcap.
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
    """softcap: 0 is none. hidden_gradient, weight_gradient: backward will ask for them, so forward may prepare them."""

    ignore_index: int
    reduction: str
    label_smoothing: float
    z_loss: float
    softcap: float
    hidden_gradient: bool
    weight_gradient: bool


def _fake(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    num_items: torch.Tensor | None,
    token_weights: torch.Tensor | None,
    weight_gradient_sum: torch.Tensor | None,
    params: LinearCrossEntropyParams,
) -> tuple:
    by_token = params.reduction == "none"
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    return (
        hidden.new_empty(labels.shape if by_token else (), dtype=dtype),
        hidden.new_empty((0,) if by_token else labels.shape, dtype=dtype),
    )


CONTRACT = Contract(
    "linear_cross_entropy",
    ("hidden", "weight", "labels", "num_items?", "token_weights?", "weight_gradient_sum?"),
    ("loss", "token_losses"),
    LinearCrossEntropyParams,
    _fake,
    constants=("token_losses",),
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
    token_weights: torch.Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    return_token_losses: bool = False,
    weight_gradient_sum: torch.Tensor | None = None,
    implementation: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Cross entropy of `hidden @ weight.T` against `labels`; the logits of all tokens never exist at once.

    hidden: [T, H], floating point, any strides.
    weight: [V, H], the dtype of hidden.
    labels: [T], int64, each in [0, V) or equal to ignore_index. A label out of range raises IndexError on a CPU. On a
        GPU, where looking would wait for the device, it makes the loss and the gradients NaN ("tilestack-triton") or
        fails torch's device-side assertion ("reference"). Nothing is shifted here: for labels [B, S] that lie beside
        their own tokens, give `torch.nn.functional.pad(labels, (0, 1), value=ignore_index)[:, 1:].flatten()`.
    ignore_index: tokens with this label have loss 0 and no gradient.
    reduction: "mean" divides the sum by the number of labels that count, "sum" does not divide, "none" gives one loss
        a token.
    num_items: what "mean" divides by instead: a number, or a tensor of one element on hidden's device, which is never
        read on the host. For the mean over a global batch: the labels that count in all micro-batches and ranks.
        A divisor of 0 counts as 1.
    token_weights: [T], float32 (float64 if hidden is): multiplies each token's loss; no gradient flows to it. "mean"
        goes on dividing by the number of labels, or by num_items, not by the sum of the weights.
    label_smoothing: in [0, 1]: this share of the target is spread evenly over the vocabulary.
    z_loss: at least 0: this much of the square of the log-sum-exp is added to the loss of a token.
    softcap: above 0: logits become softcap * tanh(logits / softcap); None leaves them.
    return_token_losses: also return the loss of each token, [T], undivided, without a gradient.
    weight_gradient_sum: [V, H], float32 (float64 if hidden is): backward adds weight's gradient to it, in float32, and
        autograd gets none for weight. For a sum over micro-batches, where nothing hooks weight. hidden must require a
        gradient, and torch.compile cannot trace it.
    implementation: "tilestack-triton" or "reference"; None chooses.

    Returns the loss, float32 (float64 if hidden is): a scalar, or [T] for reduction="none"; with return_token_losses
    `(loss, token_losses)`. Differentiable in hidden and weight.
    Raises ValueError for wrong shapes, dtypes, devices or options.
    """
    op = "linear_cross_entropy"
    _check_tensors(hidden, weight, labels)
    if reduction not in REDUCTIONS:
        raise ValueError(f"{op}: reduction must be one of {', '.join(map(repr, REDUCTIONS))}, got {reduction!r}")
    if return_token_losses and reduction == "none":
        raise ValueError(
            f"{op}: return_token_losses goes with a scalar loss; reduction='none' is the loss of each token"
        )
    _check_options(label_smoothing, z_loss, softcap)
    num_items = _divisor(num_items, reduction, hidden)
    if token_weights is not None:
        checks.shape(op, "token_weights", token_weights, tuple(labels.shape), "[T], the shape of labels")
        checks.dtype(op, "token_weights", token_weights, torch.promote_types(hidden.dtype, torch.float32))
        token_weights = token_weights.detach()
    checks.same_device(
        op, hidden=hidden, weight=weight, labels=labels, num_items=num_items, token_weights=token_weights
    )
    recording = torch.is_grad_enabled()
    params = LinearCrossEntropyParams(
        ignore_index, reduction, float(label_smoothing), float(z_loss), float(softcap or 0.0),
        recording and hidden.requires_grad, recording and weight.requires_grad,
    )  # fmt: skip
    if weight_gradient_sum is not None:
        _check_sum(weight_gradient_sum, hidden, weight, params)
        # .data: it is written in backward, which must not make the saved tensor of another call look outdated
        weight_gradient_sum = weight_gradient_sum.data if params.weight_gradient else None
        weight = weight.detach()
    tensors = (hidden, weight, labels, num_items, token_weights, weight_gradient_sum)
    loss, token_losses = OP(tensors, params, implementation)
    return (loss, token_losses) if return_token_losses else loss


def _check_tensors(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> None:
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


def _check_sum(
    weight_gradient_sum: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor, params: LinearCrossEntropyParams
) -> None:
    op = "linear_cross_entropy"
    checks.shape(op, "weight_gradient_sum", weight_gradient_sum, tuple(weight.shape), "[V, H], the shape of weight")
    wide = torch.promote_types(hidden.dtype, torch.float32)
    checks.dtype(op, "weight_gradient_sum", weight_gradient_sum, wide)
    checks.same_device(op, hidden=hidden, weight_gradient_sum=weight_gradient_sum)
    if params.weight_gradient and not params.hidden_gradient:
        raise ValueError(f"{op}: weight_gradient_sum is written in backward, which needs hidden to require a gradient")
    if torch.compiler.is_compiling():
        raise ValueError(f"{op}: weight_gradient_sum is written in backward, which torch.compile cannot trace")


def _check_options(label_smoothing: float, z_loss: float, softcap: float | None) -> None:
    op = "linear_cross_entropy"
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"{op}: label_smoothing must be in [0, 1], got {label_smoothing}")
    checks.at_least(op, "z_loss", z_loss, 0)
    if softcap is not None and not 0 < softcap < float("inf"):
        raise ValueError(f"{op}: softcap must be a number above 0, or None for none, got {softcap}")


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
