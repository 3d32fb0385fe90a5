"""Cross entropy of logits that exist, whole or one shard of the vocabulary: the contract.

    z[t, j] = logit_scale * logits[t, j]
    lse[t] = log(sum_j exp(z[t, j]))
    loss[t] = lse[t] - (1 - label_smoothing) * z[t, label] - label_smoothing / total_classes * sum_j z[t, j]
              + lse_square_scale * lse[t]^2                                                 (the z-loss)

and 0 where the label is ignore_index. Of a shard, the terms with lse are left out: they need the lse of all shards,
which are added up outside. The gradient is `cross_entropy_gradient`, an op of its own because it may be written over
the logits. `linear_cross_entropy` is the model's own, which never has the logits.

Sources: Szegedy et al., "Rethinking the Inception Architecture" (2016), section 7, for label smoothing; Chowdhery et
al., "PaLM" (2022), section 5, for the z-loss.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tilestack.kernels import checks
from tilestack.kernels.dispatch import Op, portable, reference
from tilestack.kernels.registration import Contract


@dataclass(frozen=True)
class CrossEntropyParams:
    """class_start: the class of column 0. is_shard: leave out the terms with lse."""

    label_smoothing: float
    logit_scale: float
    lse_square_scale: float
    ignore_index: int
    class_start: int
    total_classes: int
    is_shard: bool


def _fake(logits, labels, lse, params) -> tuple[torch.Tensor, ...]:
    return rows_like(logits), rows_like(logits), rows_like(logits)


def rows_like(logits: torch.Tensor) -> torch.Tensor:
    """One uninitialised number a row, float32 (float64 for float64 logits)."""
    return logits.new_empty(logits.shape[:1], dtype=torch.promote_types(logits.dtype, torch.float32))


NAMES = ("losses", "z_losses", "lse_out")
CONTRACT = Contract(
    "cross_entropy", ("logits", "labels", "lse?"), NAMES, CrossEntropyParams, _fake, constants=NAMES
)  # fmt: skip
OP = Op(CONTRACT, (portable("cross_entropy"), reference("cross_entropy")))


@torch.no_grad()
def cross_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    lse: torch.Tensor | None = None,
    label_smoothing: float = 0.0,
    logit_scale: float = 1.0,
    lse_square_scale: float = 0.0,
    ignore_index: int = -100,
    class_start: int = 0,
    total_classes: int | None = None,
    is_shard: bool = False,
    implementation: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The loss of each row. Nothing is recorded by autograd; `cross_entropy_gradient` has the gradient.

    logits: [T, V], floating point, any strides.
    labels: [T], int64, each in [0, total_classes) or ignore_index. A label of another shard counts as none.
    lse: [T], float32, of the scaled logits, if it is known already; then the logits are not read for it.
    class_start, total_classes: of a shard: the class of column 0, and the classes of all shards; None is V.
    is_shard: leave out of the losses what needs the lse of all shards.
    implementation: "tilestack-triton" or "reference"; None chooses.

    Returns (losses, z_losses, lse), [T] float32 (float64 for float64 logits); z_losses is the part
    lse_square_scale * lse^2 of losses. Raises ValueError for wrong shapes, dtypes, devices or numbers.
    """
    check_arguments("cross_entropy", logits, labels, lse, label_smoothing)
    params = CrossEntropyParams(
        float(label_smoothing), float(logit_scale), float(lse_square_scale), ignore_index, class_start,
        logits.shape[1] if total_classes is None else total_classes, is_shard,
    )  # fmt: skip
    return OP((logits, labels, lse), params, implementation)


def check_arguments(
    op: str, logits: torch.Tensor, labels: torch.Tensor, lse: torch.Tensor | None, label_smoothing: float
) -> None:
    """What cross_entropy and its gradient ask of their arguments."""
    checks.floating(op, logits=logits)
    checks.rank(op, "logits", logits, (2,), "[T, V] (flatten batch and sequence)")
    checks.at_least(op, "V (the columns of logits)", logits.shape[1], 1)
    checks.dtype(op, "labels", labels, torch.int64)
    checks.shape(op, "labels", labels, (logits.shape[0],), "[T], T the first dimension of logits")
    checks.same_device(op, logits=logits, labels=labels, lse=lse)
    if lse is not None:
        checks.dtype(op, "lse", lse, torch.promote_types(logits.dtype, torch.float32))
        checks.shape(op, "lse", lse, (logits.shape[0],), "[T], T the first dimension of logits")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"{op}: label_smoothing must be at least 0 and less than 1, got {label_smoothing}")
