"""The gradient of `cross_entropy` in the logits, which may be written over them: the contract.

    p[t, j] = exp(z[t, j] - lse[t])
    dlogits[t, j] = dlosses[t] * logit_scale * (p[t, j] * (1 + 2 * lse_square_scale * lse[t])
                    - label_smoothing / total_classes - (1 - label_smoothing) [j == label])

and 0 where the label is ignore_index.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tilestack.kernels import checks
from tilestack.kernels.cross_entropy.op import check_arguments
from tilestack.kernels.dispatch import Op, portable, reference
from tilestack.kernels.registration import InPlaceContract


@dataclass(frozen=True)
class CrossEntropyGradientParams:
    label_smoothing: float
    logit_scale: float
    lse_square_scale: float
    ignore_index: int
    class_start: int
    total_classes: int


CONTRACT = InPlaceContract(
    "cross_entropy_gradient",
    ("dlogits", "logits?", "labels", "lse", "dlosses"),
    ("dlogits",),
    CrossEntropyGradientParams,
)
OP = Op(CONTRACT, (portable("cross_entropy_gradient"), reference("cross_entropy_gradient")))


@torch.no_grad()
def cross_entropy_gradient(
    dlosses: torch.Tensor,
    logits: torch.Tensor,
    labels: torch.Tensor,
    lse: torch.Tensor,
    *,
    label_smoothing: float = 0.0,
    logit_scale: float = 1.0,
    lse_square_scale: float = 0.0,
    ignore_index: int = -100,
    class_start: int = 0,
    total_classes: int | None = None,
    inplace: bool = False,
    implementation: str | None = None,
) -> torch.Tensor:
    """The gradient of the losses of `cross_entropy`, whose arguments these are.

    dlosses: [T], floating point, any strides.
    lse: [T], float32: of a shard, the lse of all shards.
    inplace: write into logits, and return them. Their last stride must be 1.
    implementation: "tilestack-triton" or "reference"; None chooses.

    Returns dlogits like logits. Raises ValueError for wrong shapes, dtypes, devices or numbers.
    """
    op = "cross_entropy_gradient"
    check_arguments(op, logits, labels, lse, label_smoothing)
    checks.floating(op, dlosses=dlosses)
    checks.shape(op, "dlosses", dlosses, (logits.shape[0],), "[T], T the first dimension of logits")
    checks.same_device(op, logits=logits, dlosses=dlosses)
    if inplace and logits.stride(-1) != 1:
        raise ValueError(f"{op}: the last stride of logits must be 1 to write into them, got {logits.stride(-1)}")
    params = CrossEntropyGradientParams(
        float(label_smoothing), float(logit_scale), float(lse_square_scale), ignore_index, class_start,
        logits.shape[1] if total_classes is None else total_classes,
    )  # fmt: skip
    dlogits = logits if inplace else logits.new_empty(logits.shape)
    OP((dlogits, None if inplace else logits, labels, lse, dlosses), params, implementation)
    return dlogits
