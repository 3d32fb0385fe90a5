"""Floating-point operations of a training step, by one stated convention.

Causal attention is counted once (half of the square), the router is left out, forward and backward are three times the
forward: 6 * (parameters used by a token, without the input embedding) + 6 * L * Hq * D * S per token. Megatron-LM and
NVIDIA's published figures use the same. Recomputation is not counted.
"""

from __future__ import annotations

from transformers import PretrainedConfig


def active_parameters(config: PretrainedConfig) -> int:
    """Parameters that multiply each token: attention projections, K experts (or the dense MLP), the LM head."""
    hidden, head_dim = config.hidden_size, config.head_dim
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    attention = hidden * head_dim * (2 * heads + 2 * kv_heads)
    total = config.vocab_size * hidden
    for layer in range(config.num_hidden_layers):
        total += attention + 3 * hidden * _mlp_width(config, layer)
    return total


def _mlp_width(config: PretrainedConfig, layer: int) -> int:
    sparse = config.num_experts > 0 and (layer + 1) % config.decoder_sparse_step == 0
    if sparse and layer not in config.mlp_only_layers:
        return config.num_experts_per_tok * config.moe_intermediate_size
    return config.intermediate_size


def training_flops_per_token(config: PretrainedConfig, seqlen: int) -> int:
    """Forward and backward of one token in a causal sequence of `seqlen` tokens."""
    attention = config.num_hidden_layers * config.num_attention_heads * config.head_dim * seqlen
    return 6 * active_parameters(config) + 6 * attention
