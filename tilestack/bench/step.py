"""`tilestack bench step`: one training step (forward, loss, backward) beside plain transformers, in one run.

The model is Qwen3-30B-A3B's shape cut to a few layers, with random weights and the full vocabulary. Every
implementation starts from the same weights and sees the same tokens, drawn from a Zipf distribution over the
vocabulary, so that there is something to learn and the router has something to route. The first losses of a short
training run (AdamW) are written beside the times.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

from tilestack.bench.results import FOLDER, Row, write
from tilestack.bench.timing import ceilings, measure
from tilestack.models.flops import training_flops_per_token

LOSS_STEPS = 20
LEARNING_RATE = 3e-4


@dataclass(frozen=True)
class StepCase:
    """What is timed: `batch` sequences of `seqlen` tokens through `layers` layers, in bf16."""

    model: str = "Qwen3-30B-A3B"
    layers: int = 4
    batch: int = 4
    seqlen: int = 4096

    def as_dict(self) -> dict:
        return {
            "model": self.model, "layers": self.layers, "batch": self.batch, "seqlen": self.seqlen, "gpus": 1,
            "zero": 0, "expert_parallel": 1, "sequence_parallel": 1, "checkpointing": False, "optimizer": None,
        }  # fmt: skip


def qwen3_30b_a3b(layers: int) -> transformers.Qwen3MoeConfig:
    """The public configuration of Qwen3-30B-A3B with fewer layers."""
    return transformers.Qwen3MoeConfig(
        vocab_size=151936, hidden_size=2048, intermediate_size=6144, num_hidden_layers=layers,
        num_attention_heads=32, num_key_value_heads=4, head_dim=128, max_position_embeddings=40960,
        num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768, norm_topk_prob=True,
        rms_norm_eps=1e-6, rope_parameters={"rope_type": "default", "rope_theta": 1e6}, tie_word_embeddings=False,
        use_cache=False,
    )  # fmt: skip


def plain_transformers(config: transformers.Qwen3MoeConfig) -> torch.nn.Module:
    """transformers as it comes: grouped_mm experts, SDPA attention (cuDNN on Hopper)."""
    return transformers.Qwen3MoeForCausalLM._from_config(
        config, attn_implementation="sdpa", experts_implementation="grouped_mm", dtype=torch.bfloat16
    )


def with_tilestack(config: transformers.Qwen3MoeConfig) -> torch.nn.Module:
    """The same class from tilestack, every kernel chosen by itself."""
    from tilestack import Qwen3MoeForCausalLM

    return Qwen3MoeForCausalLM._from_config(config, dtype=torch.bfloat16)


IMPLEMENTATIONS: dict[str, Callable[[transformers.Qwen3MoeConfig], torch.nn.Module]] = {
    "transformers": plain_transformers,
    "tilestack": with_tilestack,
}


def build(name: str, case: StepCase, seed: int = 0) -> torch.nn.Module:
    """The model on the GPU, with weights that depend on `seed` alone."""
    torch.manual_seed(seed)
    with torch.device("cuda"):
        model = IMPLEMENTATIONS[name](qwen3_30b_a3b(case.layers))
    return model.train()


def zipf_tokens(batch: int, seqlen: int, vocabulary: int, seed: int) -> torch.Tensor:
    """[batch, seqlen] tokens, rank r with probability proportional to 1 / (r + 10); ranks are shuffled over ids."""
    generator = torch.Generator().manual_seed(seed)
    weights = 1.0 / (torch.arange(vocabulary, dtype=torch.float64) + 10)
    ranks = torch.multinomial(weights, batch * seqlen, replacement=True, generator=generator)
    ids = torch.randperm(vocabulary, generator=torch.Generator().manual_seed(0))
    return ids[ranks].view(batch, seqlen).cuda()


def time_step(name: str, case: StepCase, repeats: int) -> Row:
    """Median time of forward, loss and backward with gradients in bf16, freshly allocated each time."""
    model = build(name, case)
    tokens = zipf_tokens(case.batch, case.seqlen, model.config.vocab_size, seed=1)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()

    timing = measure(step, repeats)
    n_tokens = case.batch * case.seqlen
    flops = training_flops_per_token(model.config, case.seqlen) * n_tokens
    return Row(
        op="step", case=case.as_dict(), implementation=name, direction="step",
        ms_median=timing.median, ms_min=timing.low, ms_max=timing.high,
        tflops=flops / timing.median / 1e9, peak_gib=timing.peak_gib,
        tokens_per_s=n_tokens / timing.median * 1e3, overhead_us=timing.overhead_us, cold_s=timing.cold_s,
    )  # fmt: skip


def first_losses(name: str, case: StepCase, steps: int = LOSS_STEPS) -> Row:
    """Losses of the first optimizer steps, batch 1: AdamW with bf16 states, which fits beside transformers' logits."""
    case = StepCase(case.model, case.layers, 1, case.seqlen)
    model = build(name, case)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
    losses = []
    for step in range(steps):
        tokens = zipf_tokens(1, case.seqlen, model.config.vocab_size, seed=100 + step)
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
    described = case.as_dict() | {"optimizer": "adamw-bf16"}
    return Row("step", described, name, "step", losses=[float(each) for each in losses])


def attempt(measurement: Callable[[], Row], name: str, case: StepCase) -> Row:
    """A row even if the variant fails, with the reason: one failure must not lose the others' figures."""
    try:
        row = measurement()
    except (RuntimeError, ValueError) as failure:
        row = Row("step", case.as_dict(), name, "step", error=f"{type(failure).__name__}: {str(failure)[:300]}")
    gc.collect()
    torch.cuda.empty_cache()
    return row


def run(
    cases: list[StepCase], implementations: list[str] | None = None, repeats: int = 20, folder: Path = FOLDER
) -> Path:
    """Time every implementation on every case, print as it goes, write the result file."""
    names = implementations or list(IMPLEMENTATIONS)
    limits = ceilings()
    print(f"ceilings: {limits}", flush=True)
    rows = []
    for case in cases:
        for name in names:
            rows.append(attempt(lambda n=name, c=case: time_step(n, c, repeats), name, case))
            print(describe(rows[-1]), flush=True)
    for name in names:
        rows.append(attempt(lambda n=name: first_losses(n, cases[0]), name, cases[0]))
        print(describe(rows[-1]), flush=True)
    return write("step", rows, limits, folder)


def describe(row: Row) -> str:
    """One line for the terminal."""
    shape = f"{row.case['batch']} x {row.case['seqlen']}, {row.case['layers']} layers"
    if row.error:
        return f"{row.implementation:14} {shape}: {row.error}"
    if row.losses:
        return f"{row.implementation:14} {shape}: losses {' '.join(f'{each:.4f}' for each in row.losses)}"
    spread = (row.ms_max - row.ms_min) / row.ms_median if row.ms_median else math.nan
    return (
        f"{row.implementation:14} {shape}: {row.ms_median:7.1f} ms (spread {spread:.1%}), {row.tflops:5.0f} TFLOP/s, "
        f"{row.tokens_per_s:7.0f} tokens/s, {row.peak_gib:5.1f} GiB, first call {row.cold_s:.1f} s"
    )
