"""Plain transformers in the same training loop: its untouched model behind the few arguments that an engine passes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import transformers
from transformers import PreTrainedTokenizerBase

from tilestack.app.config import Config
from tilestack.app.data.packing import MicroBatch
from tilestack.app.model import build, model_config
from tilestack.models import materialise, recompute_activations

# what transformers takes by itself, said by name: SDPA (cuDNN or flash on a GPU) and grouped matrix products
BY_ITSELF = {"attn_implementation": "sdpa", "experts_implementation": "grouped_mm"}


class PlainTransformers(torch.nn.Module):
    """transformers' own Qwen3MoeForCausalLM as the engines call a model.

    The load-balancing loss is on where its coefficient is not 0, as in a training with transformers alone.
    """

    def __init__(self, inner: transformers.Qwen3MoeForCausalLM):
        super().__init__()
        self.inner, self.config = inner, inner.config
        self._coefficient = inner.router_aux_loss_coef

    def forward(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        num_items_in_batch: torch.Tensor | int,
        aux_loss_divisor: float = 1,
        position_ids: torch.Tensor | None = None,
        **ours: Any,
    ) -> SimpleNamespace:
        """The micro-batch's share of the step's loss; `ours` are arguments that transformers does not have."""
        balanced = self._coefficient != 0
        self.inner.router_aux_loss_coef = self._coefficient / aux_loss_divisor
        output = self.inner(
            input_ids=input_ids,
            labels=labels,
            position_ids=position_ids,
            num_items_in_batch=num_items_in_batch,
            output_router_logits=balanced,
            use_cache=False,
        )
        aux_loss = output.aux_loss.detach() if balanced else 0.0
        return SimpleNamespace(loss=output.loss, aux_loss=aux_loss, tokens_per_expert=None)


def build_plain(config: Config, tokenizer: PreTrainedTokenizerBase, device: torch.device) -> PlainTransformers:
    """The model that `app.model.build` makes, with the same weights, as transformers alone makes it."""
    ours, weights = build(config, tokenizer)
    with torch.device("meta"):
        inner = transformers.Qwen3MoeForCausalLM._from_config(
            model_config(config, tokenizer), dtype=ours.dtype, **BY_ITSELF
        )
    materialise(inner, weights, device)
    recompute_activations(inner, config.model.activation_checkpointing)
    return PlainTransformers(inner)


def as_transformers_likes_it(batch: MicroBatch) -> MicroBatch:
    """The micro-batch with pieces of one length as rows of a batch, for which SDPA needs no mask; others stay packed.

    In a packed row the positions that restart tell transformers where documents begin, and it makes a mask of T x T.
    """
    length, *others = set(batch["cu_seqlens"].diff().tolist())
    if others:
        return {name: each for name, each in batch.items() if name != "cu_seqlens"}
    rows = {name: batch[name].view(-1, length) for name in ("input_ids", "labels")}
    return rows | {"num_items": batch["num_items"]}


def sums_of_weights(model: torch.nn.Module) -> torch.Tensor:
    """The sum of every parameter: what tells two models with the same weights from two without."""
    return torch.stack([each.detach().sum(dtype=torch.float64) for each in model.parameters()])
