"""The rotary frequencies must be float32, whatever the model's dtype."""

from __future__ import annotations

import torch
from torch import nn
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRotaryEmbedding


def restore_rotary_frequencies(model: nn.Module, device: torch.device | None = None) -> int:
    """Compute the frequency buffers of every rotary embedding in `model` again, in float32; returns how many.

    device: where they are to lie; None: where they are.

    transformers 5.17 under deepspeed.zero.Init makes them in bf16, and so does `model.bfloat16()`, which DeepSpeed
    calls: at position 32,768 the angle is then off by tens of radians. Call it after deepspeed.initialize too.
    """
    found = [each for each in model.modules() if isinstance(each, Qwen3MoeRotaryEmbedding)]
    for rotary in found:
        with torch.device("cpu"):  # the same bits wherever the model lies
            fresh = type(rotary)(rotary.config)
        rotary.attention_scaling = fresh.attention_scaling
        for name in ("inv_freq", "original_inv_freq"):
            setattr(rotary, name, getattr(fresh, name).to(device or getattr(rotary, name).device))
    return len(found)
