"""The tiny model and the micro-batches that all tests of the engines share."""

import torch
import transformers
from transformers import Qwen3MoeConfig

from tilestack import Qwen3MoeForCausalLM

VOCABULARY = 96


def tiny_config(**changes) -> Qwen3MoeConfig:
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "moe_intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "router_aux_loss_coef": 0.1,  # large, so that a wrong scale of it is seen
        "max_position_embeddings": 128,
    }
    return Qwen3MoeConfig(**settings | changes)


def tiny_model(dtype=torch.float32, **changes) -> Qwen3MoeForCausalLM:
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM._from_config(tiny_config(**changes), dtype=dtype)


def plain_model() -> transformers.Qwen3MoeForCausalLM:
    """The same weights in transformers' own class, untouched."""
    model = transformers.Qwen3MoeForCausalLM(tiny_config(attn_implementation="sdpa", use_cache=False))
    model.load_state_dict(tiny_model().state_dict())
    return model


def micro_batch(seed: int, lengths: tuple[int, ...] = (20, 28)) -> dict:
    """One packed micro-batch: documents of these lengths, the first label of each ignored, and some more."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCABULARY, (1, sum(lengths)), generator=generator)
    labels = tokens.clone()
    starts = torch.tensor([0, *lengths]).cumsum(0)
    labels[:, starts[:-1]] = -100
    labels[:, : seed % 7] = -100
    return {
        "input_ids": tokens,
        "labels": labels,
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
        "cu_seqlens": starts.to(torch.int32),
    }


def global_step(step: int, micro_batches: int) -> list[dict]:
    """The micro-batches of one step, of different lengths, with the number of labels of all of them."""
    batches = [micro_batch(100 * step + i, lengths=(12 + 3 * i, 30 - 2 * i)) for i in range(micro_batches)]
    num_items = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
    return [batch | {"num_items": num_items} for batch in batches]
