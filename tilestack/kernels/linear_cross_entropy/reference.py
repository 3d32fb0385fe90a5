"""linear_cross_entropy in plain torch: the definition, a chunk of tokens at a time.

A chunk's logits are made, used and dropped, so that training on a CPU never holds [T, V] numbers. Backward makes them
again. dweight is summed over the chunks in float32.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from tilestack.kernels.dispatch import Call
from tilestack.kernels.reference_autograd import gradients

AUXILIARY = ()
SAVED = ("hidden", "weight", "labels", "num_items", "token_weights", "weight_gradient_sum")

MAX_CHUNK_LOGITS = 2**26  # 256 MiB of float32; a few tensors of that size are alive at once in backward


def refuses(call: Call) -> str | None:
    return None


def token_losses(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, token_weights: torch.Tensor | None, params
) -> tuple[torch.Tensor]:
    """The loss of each token, [T]: the op's mathematics."""
    logits = hidden @ weight.T
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if params.softcap:
        wide = params.softcap * torch.tanh(wide / params.softcap)
    losses = torch.nn.functional.cross_entropy(
        wide, labels, ignore_index=params.ignore_index, label_smoothing=params.label_smoothing, reduction="none"
    )
    if params.z_loss:
        losses = losses + params.z_loss * wide.logsumexp(-1).square().masked_fill(labels == params.ignore_index, 0)
    return (losses if token_weights is None else losses * token_weights,)


def divisor(labels: torch.Tensor, num_items: torch.Tensor | None, params, dtype: torch.dtype) -> torch.Tensor | float:
    """What the summed loss is divided by: 1 for "sum" and "none"; never 0."""
    if params.reduction != "mean":
        return 1.0
    counted = (labels != params.ignore_index).sum() if num_items is None else num_items
    return torch.where(counted == 0, 1.0, counted).to(dtype)


def check_labels(labels: torch.Tensor, vocabulary: int, params) -> None:
    """Raise IndexError for a label that is out of range, where it can be seen without waiting for a GPU."""
    if labels.is_cuda:
        return
    wrong = (labels != params.ignore_index) & ((labels < 0) | (labels >= vocabulary))
    if wrong.any():
        raise IndexError(
            f"linear_cross_entropy: labels must be in [0, {vocabulary}) or ignore_index={params.ignore_index}, "
            f"got {labels[wrong][0].item()}"
        )


def forward(hidden, weight, labels, num_items, token_weights, weight_gradient_sum, params):
    check_labels(labels, weight.shape[0], params)
    losses = hidden.new_empty(labels.shape, dtype=torch.promote_types(hidden.dtype, torch.float32))
    for chunk in _chunks(labels, weight):
        (losses[chunk],) = token_losses(hidden[chunk], weight, labels[chunk], _cut(token_weights, chunk), params)
    if params.reduction == "none":
        return losses, losses.new_empty(0)
    return losses.sum() / divisor(labels, num_items, params, losses.dtype), losses


def backward(dloss, _, hidden, weight, labels, num_items, token_weights, weight_gradient_sum, *, needs, params):
    upstream = (dloss / divisor(labels, num_items, params, dloss.dtype)).expand(labels.shape)
    found = {
        "hidden": hidden.new_empty(hidden.shape),
        "weight": weight.new_zeros(weight.shape, dtype=torch.promote_types(weight.dtype, torch.float32)),
    }
    wanted = needs if weight_gradient_sum is None else ("hidden", "weight")
    for chunk in _chunks(labels, weight):
        inputs = {
            "hidden": hidden[chunk], "weight": weight, "labels": labels[chunk],
            "token_weights": _cut(token_weights, chunk),
        }  # fmt: skip
        parts = dict(zip(wanted, gradients(token_losses, inputs, (upstream[chunk],), wanted, params), strict=True))
        if "hidden" in wanted:
            found["hidden"][chunk] = parts["hidden"]
        if "weight" in wanted:
            found["weight"] += parts["weight"]
    if weight_gradient_sum is not None:
        weight_gradient_sum += found["weight"]
    return tuple(found[name].to(weight.dtype) for name in needs)


def _cut(tensor: torch.Tensor | None, chunk: slice) -> torch.Tensor | None:
    return None if tensor is None else tensor[chunk]


def _chunks(labels: torch.Tensor, weight: torch.Tensor) -> Iterator[slice]:
    rows = max(1, MAX_CHUNK_LOGITS // weight.shape[0])
    return (slice(start, start + rows) for start in range(0, labels.shape[0], rows))
