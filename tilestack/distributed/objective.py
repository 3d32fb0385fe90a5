"""The loss of a step, in one place for all engines.

    loss = sum of token losses / num_items  +  router_aux_loss_coef * mean of the load-balancing losses

The sum runs over every label of the step and the mean over every micro-batch of every rank, so the value depends
neither on how the step is cut into micro-batches' groups nor on how many ranks share them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from tilestack.distributed.engine import MicroBatch, StepResult

IGNORED = -100


class StepSums:
    """The sums of a step over this rank's micro-batches, on the device; `reduce` makes the result of all ranks.

    micro_batches: how many the step has, over all ranks.
    """

    def __init__(self, model: torch.nn.Module, micro_batches: int, device: torch.device):
        self.model = model
        self.micro_batches = micro_batches
        self.routed = _has_routers(model)
        experts = model.config.num_experts if self.routed else 0
        # one tensor, so that one collective reduces it: loss, load-balancing loss, routes by expert
        self.sums = torch.zeros(2 + experts, dtype=torch.float32, device=device)

    def forward(self, batch: MicroBatch) -> torch.Tensor:
        """The micro-batch's share of the step's loss, to be differentiated: the shares of a step add up to it."""
        with _share_of_aux_loss(self.model, 1 / self.micro_batches):
            output = self.model(
                **model_inputs(batch, self.sums.device),
                num_items_in_batch=batch["num_items"],
                output_router_logits=self.routed,
                use_cache=False,
            )
        with torch.no_grad():
            self.sums[0] += output.loss
            if self.routed:
                self.sums[1] += output.aux_loss / self.micro_batches
                self.sums[2:] += _routes_by_expert(output.router_logits, self.model.config.num_experts_per_tok)
        return output.loss

    def result(self, grad_norm: torch.Tensor) -> StepResult:
        """The step's result, from sums that were added up over the ranks."""
        load = self.sums[2:] / self.sums[2:].sum() if self.routed else None
        return StepResult(self.sums[0], self.sums[1], grad_norm, load)


def model_inputs(batch: MicroBatch, device: torch.device) -> dict[str, torch.Tensor]:
    """The micro-batch in the model's argument names, on the device."""
    moved = {
        name: tensor.to(device, non_blocking=True)
        for name, tensor in batch.items()
        if name in ("input_ids", "labels", "position_ids", "cu_seqlens")
    }
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
                output = model(**inputs, num_items_in_batch=1, output_router_logits=False, use_cache=False)
                sums[0] += output.loss
                # the model shifts: the first label of a row is nobody's target
                sums[1] += (inputs["labels"][:, 1:] != IGNORED).sum()
    finally:
        model.train(was_training)
    return sums


def _has_routers(model: torch.nn.Module) -> bool:
    return any(name.endswith("mlp.gate") for name, _ in model.named_modules())


def _routes_by_expert(router_logits: tuple[torch.Tensor, ...], top_k: int) -> torch.Tensor:
    first = router_logits[0]
    routes = torch.zeros(first.shape[-1], dtype=torch.float32, device=first.device)
    for logits in router_logits:
        chosen = logits.topk(top_k, dim=-1).indices.flatten()
        routes.index_add_(0, chosen, torch.ones_like(chosen, dtype=torch.float32))
    return routes


@contextlib.contextmanager
def _share_of_aux_loss(model: torch.nn.Module, share: float) -> Iterator[None]:
    """transformers' forward adds coef * aux_loss whole for every micro-batch; here each adds its share of the mean."""
    coefficient = model.router_aux_loss_coef
    model.router_aux_loss_coef = coefficient * share
    try:
        yield
    finally:
        model.router_aux_loss_coef = coefficient
