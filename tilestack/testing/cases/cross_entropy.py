"""Cases of cross_entropy: losses; tests/compat has the pair with its gradient."""

from __future__ import annotations

import torch

from tilestack.kernels import cross_entropy
from tilestack.testing.compare import Case, OpCases


def make(
    rows: int, classes: int, *, lse: bool = False, start: int = 0, total: int | None = None, strided: bool = False
):
    """logits, labels (of all classes, the first of them ignored) and, if asked for, lse."""

    def build(dtype, device, generator):
        logits = (3 * torch.randn(rows, 2 * classes, generator=generator)).to(device, dtype)
        logits = logits[:, ::2] if strided else logits[:, :classes].contiguous()
        labels = torch.randint(total or classes, (rows,), generator=generator)
        labels[:1] = -100
        wide = torch.promote_types(dtype, torch.float32)
        known = logits.to(wide).logsumexp(-1) if lse else None
        return {"logits": logits, "labels": labels.to(device), "lse": known}

    return build


def _call(tensors, arguments, implementation):
    found = cross_entropy(**tensors, **arguments, implementation=implementation)
    return dict(zip(("losses", "z_losses", "lse"), found, strict=True))


# arguments that the gradient shares
SHARED = (
    ("plain", "the common case", {"rows": 5, "classes": 40}, {}),
    ("smoothed", "the mean of all logits counts", {"rows": 5, "classes": 40}, {"label_smoothing": 0.1}),
    ("scaled", "scores are multiplied", {"rows": 5, "classes": 40}, {"logit_scale": 0.7, "label_smoothing": 0.2}),
    ("z-loss", "lse is pulled to 0", {"rows": 5, "classes": 40}, {"lse_square_scale": 0.1}),
    ("more than a block", "the last block is masked", {"rows": 3, "classes": 4999}, {"label_smoothing": 0.1}),
    ("strided", "columns are not contiguous", {"rows": 4, "classes": 40, "strided": True}, {}),
    ("one class", "nothing to choose from", {"rows": 3, "classes": 1}, {}),
    ("no rows", "an empty batch", {"rows": 0, "classes": 40}, {}),
)  # fmt: skip
SHARD = {"rows": 9, "classes": 40, "start": 40, "total": 120}
SHARD_ARGUMENTS = {"class_start": 40, "total_classes": 120, "label_smoothing": 0.1}
REAL = {"rows": 1024, "classes": 128256}

CASES = OpCases(
    op="cross_entropy",
    call=_call,
    differentiable=(),
    cases=(
        *(Case(name, why, make(**shape), arguments) for name, why, shape, arguments in SHARED),
        Case("known lse", "only the label's logit is read", make(5, 40, lse=True), {"lse_square_scale": 0.1}),
        Case("a shard", "labels of other shards", make(**SHARD), SHARD_ARGUMENTS | {"is_shard": True}),
        Case("Llama 3's vocabulary", "a real shape", make(**REAL), {"lse_square_scale": 1e-4}, gpu_only=True),
    ),
)
