"""`tilestack bench step`: one training step (forward, loss, backward) beside transformers' ways to run it, in one run.

The model is Qwen3-30B-A3B's shape cut to a few layers, with random weights and the full vocabulary. Every
implementation starts from the same weights and sees the same tokens, drawn from a Zipf distribution over the
vocabulary, so that there is something to learn and the router has something to route. Beside the times: the first
losses of a short training run, the longest sequence that one GPU trains on, and the optimizer's step over its bytes.

What is most wanted comes first: a run that is stopped at a time limit keeps the rows that it has. transformers and
tilestack alternate in one process; Liger-Kernel, which patches transformers for good, and torch.compile have their own.
"""

from __future__ import annotations

import gc
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import transformers

from tilestack.bench.isolated import one_after_another
from tilestack.bench.results import FOLDER, Recorder, Row
from tilestack.bench.timing import ceilings, measure
from tilestack.distributed.graphs import Recorded
from tilestack.kernels import adamw
from tilestack.models.flops import training_flops_per_token

LOSS_STEPS = 20
LEARNING_RATE = 3e-4
PATIENCE_S = 120.0  # of one job, its compiling included
ADAMW_BYTES = 28  # a parameter: bf16 gradient read, weight written; float32 master and moments read and written
PROBES = (16384, 24576)  # two lengths whose peaks give the memory of a token
FIRST_TRY = 0.98  # of the length that they predict: a step of that length takes its time, so the first should fit
LENGTH_MULTIPLE = 4096
LONGEST_TRIED = 262144  # attention's time grows with the square: a step of this length takes about 20 s


@dataclass(frozen=True)
class StepCase:
    """What is timed: `batch` sequences of `seqlen` tokens through `layers` layers, in bf16."""

    model: str = "Qwen3-30B-A3B"
    layers: int = 4
    batch: int = 4
    seqlen: int = 4096
    checkpointing: bool = False

    def as_dict(self) -> dict:
        return {
            "model": self.model, "layers": self.layers, "batch": self.batch, "seqlen": self.seqlen, "gpus": 1,
            "zero": 0, "expert_parallel": 1, "sequence_parallel": 1, "checkpointing": self.checkpointing,
            "optimizer": None,
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


def compiled_transformers(config: transformers.Qwen3MoeConfig) -> torch.nn.Module:
    """transformers under torch.compile: its layers, which then compile once for all, and the loss."""
    model = plain_transformers(config)
    for layer in model.model.layers:
        layer.compile(dynamic=False)
    model.loss_function = torch.compile(model.loss_function, dynamic=False)
    return model


def transformers_with_liger(config: transformers.Qwen3MoeConfig) -> torch.nn.Module:
    """transformers with all that Liger-Kernel replaces in it: norms, rotary, experts, LM head with the loss.

    Its experts run with the tiles that it has without tuning, which would compile hundreds of kernels at the first
    call; LIGER_FUSED_MOE_AUTOTUNE=1 in the environment brings that back.
    """
    os.environ.setdefault("LIGER_FUSED_MOE_AUTOTUNE", "0")
    from liger_kernel.transformers import apply_liger_kernel_to_qwen3_moe

    model = plain_transformers(config)
    apply_liger_kernel_to_qwen3_moe(model=model)
    return model


def with_tilestack(config: transformers.Qwen3MoeConfig) -> torch.nn.Module:
    """The same class from tilestack, every kernel chosen by itself."""
    from tilestack import Qwen3MoeForCausalLM

    return Qwen3MoeForCausalLM._from_config(config, dtype=torch.bfloat16)


GRAPH = "tilestack-graph"  # the same, forward and backward recorded as one CUDA graph, as the local engine replays them

IMPLEMENTATIONS: dict[str, Callable[[transformers.Qwen3MoeConfig], torch.nn.Module]] = {
    "transformers": plain_transformers,
    "transformers-compile": compiled_transformers,
    "liger": transformers_with_liger,
    "tilestack": with_tilestack,
    GRAPH: with_tilestack,
}
MAIN = ("transformers", "tilestack")  # whose losses and longest sequences are compared
FIRST, REST = slice(0, 1), slice(1, None)
# what shares a process, what is measured in it, of which cases; the most wanted first
PROCESSES = (
    ((*MAIN, GRAPH), ("time", "optimizer", "longest", "losses"), slice(None)),
    (("transformers-compile",), ("time",), FIRST),
    (("liger",), ("time",), FIRST),
    (("transformers-compile",), ("time",), REST),
    (("liger",), ("time",), REST),
)


def build(name: str, case: StepCase, seed: int = 0) -> torch.nn.Module:
    """The model on the GPU, with weights that depend on `seed` alone."""
    torch.manual_seed(seed)
    with torch.device("cuda"):
        model = IMPLEMENTATIONS[name](qwen3_30b_a3b(case.layers))
    if case.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def zipf_tokens(batch: int, seqlen: int, vocabulary: int, seed: int, device: str = "cuda") -> torch.Tensor:
    """[batch, seqlen] tokens, rank r with probability proportional to 1 / (r + 10); ranks are shuffled over ids."""
    generator = torch.Generator().manual_seed(seed)
    weights = 1.0 / (torch.arange(vocabulary, dtype=torch.float64) + 10)
    ranks = torch.multinomial(weights, batch * seqlen, replacement=True, generator=generator)
    ids = torch.randperm(vocabulary, generator=torch.Generator().manual_seed(0))
    return ids[ranks].view(batch, seqlen).to(device)


def _step(model: torch.nn.Module, tokens: torch.Tensor) -> None:
    """Gradients in bf16, freshly allocated."""
    model.zero_grad(set_to_none=True)
    model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()


def _recorded_step(model: torch.nn.Module, tokens: torch.Tensor) -> tuple[Callable[[], None], float]:
    """What replays the step (each replay writes the gradients anew), and the GiB that recording it allocated at most.

    A replay allocates nothing: the graph keeps the memory that its kernels use.
    """
    for _ in range(2):  # compiles
        _step(model, tokens)
    model.zero_grad(set_to_none=True)
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    recorded = Recorded(lambda: _step(model, tokens), torch.cuda.graph_pool_handle())
    return recorded.replay, torch.cuda.max_memory_allocated() / 2**30


def refuse_waits(step: Callable[[], None]) -> None:
    """Raise RuntimeError where the host waits for the GPU in a step; what is made once must have been made before."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def time_step(name: str, case: StepCase, repeats: int) -> list[Row]:
    """Median time of forward, loss and backward; ours only if the host waits for the GPU nowhere in it."""
    model = build(name, case)
    tokens = zipf_tokens(case.batch, case.seqlen, model.config.vocab_size, seed=1)
    call, recorded_gib = _recorded_step(model, tokens) if name == GRAPH else (lambda: _step(model, tokens), 0.0)
    timing = measure(call, repeats)
    if name == "tilestack":
        refuse_waits(call)
    n_tokens = case.batch * case.seqlen
    flops = training_flops_per_token(model.config, case.seqlen) * n_tokens
    row = Row(
        op="step", case=case.as_dict(), implementation=name, direction="step",
        ms_median=timing.median, ms_min=timing.low, ms_max=timing.high,
        tflops=flops / timing.median / 1e9, peak_gib=max(timing.peak_gib, recorded_gib),
        tokens_per_s=n_tokens / timing.median * 1e3, overhead_us=timing.overhead_us, cold_s=timing.cold_s,
    )  # fmt: skip
    return [row]


def first_losses(name: str, case: StepCase, steps: int) -> list[Row]:
    """Losses of the first optimizer steps: AdamW with bf16 states, which fits beside transformers' logits."""
    model = build(name, case)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
    losses = []
    for step in range(steps):
        tokens = zipf_tokens(case.batch, case.seqlen, model.config.vocab_size, seed=100 + step)
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
    described = case.as_dict() | {"optimizer": "adamw-bf16"}
    return [Row("step", described, name, "step", losses=[float(each) for each in losses])]


def longest_sequence(name: str, case: StepCase, repeats: int) -> list[Row]:
    """The longest single sequence whose step fits on the GPU, in multiples of LENGTH_MULTIPLE.

    Two short steps give the memory of a token; what they predict is tried, and less while it does not fit, but nothing
    longer than LONGEST_TRIED.
    """
    model = build(name, case)
    peaks = {seqlen: _peak_gib(model, seqlen) for seqlen in PROBES}
    per_token = (peaks[PROBES[1]] - peaks[PROBES[0]]) / (PROBES[1] - PROBES[0])
    room = torch.cuda.get_device_properties(0).total_memory / 2**30 - 1.0 - peaks[PROBES[0]]  # 1 GiB: CUDA's own
    multiples = int(min(FIRST_TRY * (PROBES[0] + room / per_token), LONGEST_TRIED) / LENGTH_MULTIPLE)
    while multiples > 0:
        seqlen = multiples * LENGTH_MULTIPLE
        try:
            peak = _peak_gib(model, seqlen)
            break
        except torch.OutOfMemoryError:
            multiples = min(multiples - 1, int(multiples * 0.97))
    else:
        raise RuntimeError(f"not even {LENGTH_MULTIPLE} tokens fit")
    case = replace(case, batch=1, seqlen=seqlen)
    return [Row("longest_sequence", case.as_dict(), name, "step", peak_gib=peak)]


def _peak_gib(model: torch.nn.Module, seqlen: int) -> float:
    tokens = zipf_tokens(1, seqlen, model.config.vocab_size, seed=1)
    model.zero_grad(set_to_none=True)
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    _step(model, tokens)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / 2**30


def optimizer_step(name: str, case: StepCase, repeats: int) -> list[Row]:
    """AdamW over every parameter of the model: bf16 weights and gradients, float32 masters and moments."""
    model = build(name, case)
    slots = []
    for parameter in model.parameters():
        state = [torch.rand_like(parameter, dtype=torch.float32).mul_(1e-6) for _ in range(2)]
        slots.append((parameter.data, torch.randn_like(parameter), *state, parameter.detach().float()))
    scale = torch.ones((), device="cuda")
    options = {"step": 10, "lr": 1e-4, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}

    def update() -> None:
        for parameter, gradient, exp_avg, exp_avg_sq, master in slots:
            adamw(parameter, gradient, exp_avg, exp_avg_sq, master=master, grad_scale=scale, **options)

    timing = measure(update, repeats)
    count = sum(each.numel() for each in model.parameters())
    row = Row(
        "optimizer", case.as_dict() | {"optimizer": "adamw", "parameters": count}, name, "step",
        ms_median=timing.median, ms_min=timing.low, ms_max=timing.high, gbps=ADAMW_BYTES * count / timing.median / 1e6,
        peak_gib=timing.peak_gib, overhead_us=timing.overhead_us, cold_s=timing.cold_s,
    )  # fmt: skip
    return [row]


KINDS: dict[str, Callable[[str, StepCase, int], list[Row]]] = {
    "time": time_step,
    "losses": first_losses,
    "longest": longest_sequence,
    "optimizer": optimizer_step,
}


@dataclass(frozen=True)
class Job:
    """One measurement in a child process; `count` is its repeats or steps."""

    implementation: str
    kind: str
    case: StepCase
    count: int


def work(job: Job) -> list[Row]:
    """What a child process does."""
    gc.collect()  # of the job before; one that failed holds its tensors until its exception has been told
    torch.cuda.empty_cache()
    return KINDS[job.kind](job.implementation, job.case, job.count)


def jobs_of(names: tuple[str, ...], kinds: tuple[str, ...], cases: list[StepCase], repeats: int) -> list[Job]:
    """All that is measured in one process: kind by kind and case by case, what is compared one after the other."""
    main = [name for name in names if name in MAIN]
    jobs = []
    for kind in kinds if cases else ():
        first = replace(cases[0], batch=1)
        if kind == "time":
            jobs += [Job(name, kind, case, repeats) for case in cases for name in names]
        elif kind == "optimizer":
            jobs += [Job(name, kind, cases[0], repeats) for name in names if name == "tilestack"]
        elif kind == "longest":
            each = [replace(first, checkpointing=checkpointing) for checkpointing in (False, True)]
            jobs += [Job(name, kind, case, 1) for case in each for name in main]
        else:
            jobs += [Job(name, kind, first, LOSS_STEPS) for name in main]
    return jobs


def run(
    cases: list[StepCase],
    implementations: list[str] | None = None,
    repeats: int = 20,
    folder: Path = FOLDER,
    kinds: list[str] | None = None,
) -> Path:
    """Measure every implementation; prints, and writes the result file, as it goes.

    implementations, kinds: names of IMPLEMENTATIONS and KINDS, None for all.

    Raises ValueError for a name that is none of them.
    """
    wanted = _known(implementations, IMPLEMENTATIONS)
    measured = _known(kinds, KINDS)
    limits = ceilings()
    torch.cuda.empty_cache()
    # for the children: whatever lies between two tensors is lost to the longest sequence
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    print(f"ceilings: {limits}", flush=True)
    # a run without times leaves the file of the times alone
    recorder = Recorder("step" if "time" in measured else "longest", limits, folder, describe)
    for process, of_process, which in PROCESSES:
        names = tuple(name for name in process if name in wanted)
        jobs = jobs_of(names, tuple(kind for kind in of_process if kind in measured), cases[which], repeats)
        for job, result in one_after_another(jobs, work, PATIENCE_S, fatal_failures=1):
            op = {"longest": "longest_sequence", "optimizer": "optimizer"}.get(job.kind, "step")
            error = result if isinstance(result, str) else None
            failed = Row(op, job.case.as_dict(), job.implementation, "step", error=error)
            for row in [failed] if error else result:
                recorder.add(row)
    return recorder.finish()


def _known(names: list[str] | None, known: dict[str, object]) -> list[str]:
    unknown = [name for name in names or () if name not in known]
    if unknown:
        raise ValueError(f"bench step: {unknown[0]!r} is not one of {', '.join(map(repr, known))}")
    return list(names or known)


def describe(row: Row) -> str:
    """One line for the terminal."""
    what = f"{row.implementation:20} {row.case['batch']} x {row.case['seqlen']}, {row.case['layers']} layers"
    what += ", checkpointing" * row.case["checkpointing"]
    if row.error:
        return f"{what}: {row.op}: {row.error}"
    if row.losses:
        return f"{what}: losses {' '.join(f'{each:.4f}' for each in row.losses)}"
    if row.op == "longest_sequence":
        return f"{what}: the longest sequence, {row.peak_gib:.1f} GiB"
    if row.op == "optimizer":
        return f"{what}: optimizer {row.ms_median:.1f} ms, {row.gbps:.0f} GB/s"
    spread = (row.ms_max - row.ms_min) / row.ms_median if row.ms_median else math.nan
    return (
        f"{what}: {row.ms_median:7.1f} ms (spread {spread:.1%}), {row.tflops:5.0f} TFLOP/s, "
        f"{row.tokens_per_s:7.0f} tokens/s, {row.peak_gib:5.1f} GiB, first call {row.cold_s:.1f} s"
    )
