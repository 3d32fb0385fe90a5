"""flash_attn.ops.triton.cross_entropy: the loss of each row of logits, whole or sharded over the vocabulary."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from tilestack.kernels import cross_entropy, cross_entropy_gradient


class CrossEntropyLoss(torch.autograd.Function):
    """cross_entropy_loss."""

    @staticmethod
    def forward(
        ctx: Any,
        logits,
        labels,
        precomputed_lse=None,
        smoothing=0.0,
        logit_scale=1.0,
        lse_square_scale=0.0,
        ignore_index=-100,
        inplace_backward=False,
        process_group=None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        labels = labels.long()
        shards = 1 if process_group is None else dist.get_world_size(process_group)
        shard = 0 if process_group is None else dist.get_rank(process_group)
        options = {
            "label_smoothing": smoothing,
            "logit_scale": logit_scale,
            "lse_square_scale": lse_square_scale,
            "ignore_index": ignore_index,
            "class_start": shard * logits.shape[1],
            "total_classes": shards * logits.shape[1],
        }
        known_lse = precomputed_lse if logit_scale == 1.0 and smoothing == 0.0 else None
        losses, z_losses, lse = cross_entropy(logits, labels, lse=known_lse, **options, is_shard=shards > 1)
        if shards > 1:
            counts = labels != ignore_index
            lse = _join(losses, lse, process_group, shards)
            z_losses = torch.where(counts, lse_square_scale * lse.square(), 0)
            losses = losses + torch.where(counts, lse + z_losses, 0)
        ctx.save_for_backward(logits, labels, lse)
        ctx.options, ctx.inplace_backward = options, inplace_backward
        ctx.mark_non_differentiable(z_losses)
        return losses, z_losses

    @staticmethod
    def backward(ctx: Any, dlosses: torch.Tensor, dz_losses: torch.Tensor) -> tuple:
        logits, labels, lse = ctx.saved_tensors
        dlogits = cross_entropy_gradient(dlosses, logits, labels, lse, **ctx.options, inplace=ctx.inplace_backward)
        return dlogits, *[None] * 8


def _join(losses: torch.Tensor, lse: torch.Tensor, group: dist.ProcessGroup, shards: int) -> torch.Tensor:
    """Add up the losses of all shards, in place; returns the lse of all."""
    adding = dist.all_reduce(losses, group=group, async_op=True)
    parts = [torch.empty_like(lse) for _ in range(shards)]
    dist.all_gather(parts, lse, group=group)
    adding.wait()
    return torch.stack(parts).logsumexp(0)


def cross_entropy_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    precomputed_lse: torch.Tensor | None = None,
    label_smoothing: float = 0.0,
    logit_scale: float = 1.0,
    lse_square_scale: float = 0.0,
    ignore_index=-100,
    inplace_backward: bool = False,
    process_group=None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of each row.

    logits: [T, V], or with process_group this rank's V columns of all ranks' in order.
    labels: [T], integers: classes of all ranks, or ignore_index.
    precomputed_lse: [T], float32: the logarithm of the sum of exp(logits) of this rank. Used where logit_scale is 1 and
        label_smoothing 0.
    lse_square_scale: adds lse_square_scale * lse^2 to each loss, which z_losses also has apart.
    inplace_backward: the gradient is written over logits.

    Returns (losses, z_losses), [T] float32; differentiable in logits through losses.
    """
    return CrossEntropyLoss.apply(
        logits, labels, precomputed_lse, label_smoothing, logit_scale, lse_square_scale, ignore_index,
        inplace_backward, process_group,
    )  # fmt: skip
