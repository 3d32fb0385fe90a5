"""The loss of a step, in one place for all engines.

    loss = sum of token losses / num_items  +  router_aux_loss_coef * mean of the load-balancing losses

The sum runs over every label of the step and the mean over every micro-batch of every rank, so the value depends
neither on how the step is cut into micro-batches' groups nor on how many ranks share them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from tilestack.distributed.engine import MicroBatch, StepResult

IGNORED = -100


class StepSums:
    """The sums of a step over this rank's micro-batches, on the device; `reduce` makes the result of all ranks.

    micro_batches: how many the step has, over all ranks; where ranks share one, each part counts.
    """

    def __init__(self, model: torch.nn.Module, micro_batches: int, device: torch.device):
        self.model = model
        self.micro_batches = micro_batches
        self.routed = _has_routers(model)
        experts = model.config.num_experts if self.routed else 0
        # one tensor, so that one collective reduces it: loss, load-balancing loss, routes by expert
        self.sums = torch.zeros(2 + experts, dtype=torch.float32, device=device)

    def forward(self, batch: MicroBatch, call: Callable | None = None) -> torch.Tensor:
        """The micro-batch's share of the step's loss, to be differentiated: the shares of a step add up to it.

        call: what runs the model, where that is not the model itself.
        """
        output = (call or self.model)(
            **model_inputs(batch, self.sums.device),
            num_items_in_batch=batch["num_items"],
            output_aux_loss=True,
            aux_loss_divisor=self.micro_batches,
        )
        with torch.no_grad():
            self.sums[0] += output.loss
            if self.routed:
                self.sums[1] += output.aux_loss / self.micro_batches
                if output.tokens_per_expert is not None:  # a model that is not ours need not count them
                    self.sums[2:] += output.tokens_per_expert.sum(0)
            # NaN where the loss is not finite, so that the gradient is NaN too: one test, of the norm, serves both
            sound = output.loss.detach() - output.loss.detach() + 1
        return output.loss * sound

    def result(self, grad_norm: torch.Tensor) -> StepResult:
        """The step's result, from sums that were added up over the ranks."""
        load = self.sums[2:] / self.sums[2:].sum() if self.routed else None
        loss, aux_loss = self.sums[:2].clone()  # replayed steps use the sums again
        return StepResult(loss, aux_loss, grad_norm, load)


def model_inputs(batch: MicroBatch, device: torch.device) -> dict[str, torch.Tensor]:
    """The micro-batch in the model's argument names, on the device."""
    names = ("input_ids", "labels", "shift_labels", "position_ids", "attention_mask", "cu_seqlens")
    given = {name: batch[name] for name in names if batch.get(name) is not None}
    moved = {name: tensor.to(device, non_blocking=True) for name, tensor in given.items()}
    offsets = moved.pop("cu_seqlens", None)
    if offsets is not None:
        moved |= {"cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets}
    return moved


def evaluation_sums(model: torch.nn.Module, batches: list[MicroBatch], device: torch.device) -> torch.Tensor:
    """float64 [2] on the device: the sum of token losses over `batches`, and how many labels there were."""
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for batch in batches:
                inputs = model_inputs(batch, device)
                sums[0] += model(**inputs, num_items_in_batch=1).ce_loss
                # the model shifts: the first label of a row is nobody's target
                targets = inputs["shift_labels"] if "shift_labels" in inputs else inputs["labels"][:, 1:]
                sums[1] += (targets != IGNORED).sum()
    finally:
        model.train(was_training)
    return sums


def _has_routers(model: torch.nn.Module) -> bool:
    return any(isinstance(module, Qwen3MoeSparseMoeBlock) for module in model.modules())
