"""The rotary frequencies must be float32, whatever the model's dtype."""

from __future__ import annotations

import torch
from torch import nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRotaryEmbedding


def restore_rotary_frequencies(model: nn.Module) -> int:
    """Compute the frequency buffers of every rotary embedding in `model` again, in float32; returns how many.

    transformers 5.17 under deepspeed.zero.Init makes them in bf16, and so does `model.bfloat16()`, which DeepSpeed
    calls: at position 32,768 the angle is then off by tens of radians. Call it after deepspeed.initialize too.
    """
    found = [each for each in model.modules() if isinstance(each, Qwen3MoeRotaryEmbedding)]
    for rotary in found:
        make = rotary.compute_default_rope_parameters
        if rotary.rope_type != "default":
            make = ROPE_INIT_FUNCTIONS[rotary.rope_type]
        with torch.device("cpu"):  # exact wherever the model lies; a context of a meta device does not reach it
            frequencies, rotary.attention_scaling = make(rotary.config, torch.device("cpu"))
        for name in ("inv_freq", "original_inv_freq"):
            setattr(rotary, name, frequencies.to(getattr(rotary, name).device, torch.float32, copy=True))
    return len(found)
