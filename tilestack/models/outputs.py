"""What the model returns: transformers' outputs and a few more fields at the end."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast


@dataclass
class MoeModelOutput(MoeModelOutputWithPast):
    """transformers' output, and the router's statistics of every MoE layer, [layers, E] each."""

    tokens_per_expert: torch.Tensor | None = None
    probability_sum: torch.Tensor | None = None


@dataclass
class MoeCausalLMOutput(MoeCausalLMOutputWithPast):
    """transformers' output, and:

    ce_loss: the cross-entropy part of `loss`, scalar.
    tokens_per_expert: routes to each expert, [MoE layers, E] float32, on the device, without a gradient.
    """

    ce_loss: torch.Tensor | None = None
    tokens_per_expert: torch.Tensor | None = None
