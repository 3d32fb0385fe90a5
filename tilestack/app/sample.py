"""Text that the model writes."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tilestack.app.config import OutputConfig


@torch.no_grad()
def sample(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, output: OutputConfig, seed: int) -> str:
    """The prompt and exactly output.sample_tokens tokens that the model writes after it.

    The length is fixed so that under ZeRO-3, where every rank takes part, all ranks make the same forward passes.
    """
    prompt = tokenizer(output.sample_prompt or tokenizer.eos_token, return_tensors="pt").to(model.device)
    warm = output.sample_temperature > 0
    torch.manual_seed(seed)
    was_training, sequence = model.training, model.model.sequence
    model.eval()
    model.shard_sequence(None)  # ranks that share rows of training each write the whole sample
    try:
        written = model.generate(
            input_ids=prompt["input_ids"],
            attention_mask=torch.ones_like(prompt["input_ids"]),
            min_new_tokens=output.sample_tokens,
            max_new_tokens=output.sample_tokens,
            do_sample=warm,
            temperature=output.sample_temperature if warm else None,
            use_cache=True,
        )
    finally:
        model.shard_sequence(sequence)
        model.train(was_training)
    return tokenizer.decode(written[0], skip_special_tokens=True)
