"""`tilestack bench distributed`: whole training steps on several GPUs, optimizer included, beside plain DeepSpeed.

The model is Qwen3-30B-A3B's shape cut to a few layers, with random weights and the full vocabulary; each rank has its
own tokens, drawn as in `bench step`. tilestack trains through its engines (`make_engine`), the rival is transformers as
it comes (grouped_mm experts, SDPA attention) under `deepspeed.initialize`, with the same optimizer. Beside them: the
same step on one GPU, and what the links between the GPUs carry.

A step's time is from its beginning to the next one's. Part of a step is profiled afterwards, on rank 0: how long
collectives ran, how much of that nothing hid, and how long the GPU had nothing to do.
"""

from __future__ import annotations

import gc
import importlib
import itertools
import os
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import transformers

from tilestack.app.trace.units import covered
from tilestack.bench.drawing import DrawnInPlace
from tilestack.bench.failures import start_failures, time_failures
from tilestack.bench.ranks import Ranks, free_ports
from tilestack.bench.results import FOLDER, Recorder, Row
from tilestack.bench.step import plain_transformers, qwen3_30b_a3b, zipf_tokens
from tilestack.bench.timing import ceilings
from tilestack.distributed import DistributedConfig, Engine, OptimizerConfig, make_engine, start
from tilestack.models import Recomputation
from tilestack.models.flops import training_flops_per_token
from tilestack.models.weights import outline

WARMUP = 4  # also the steps whose losses are kept
PROFILED = 2
LONG, LONG_WARMUP, LONG_PROFILED = 1 << 14, 2, 1  # of steps with more tokens a GPU than that
MICRO_BATCHES = 4  # different ones, over and over
PATIENCE_S, PATIENCE_OF_A_LAYER_S = 90.0, 2.0  # of one job, its compiling and its start included
WHOLE = 12  # layers: of a deeper model no rank makes what it does not keep
LINK_BYTES = 1 << 28  # what a rank has after a collective is timed
LEARNING_RATE = 1e-4
SMALL_BYTES = 1 << 24  # what kernels keep between calls is smaller
RIVAL = "transformers + DeepSpeed"


@dataclass(frozen=True)
class Case:
    """A step: `batch` sequences of `seqlen` tokens for each group of ranks that share rows, through `layers` layers.

    zero: the stage; 0 on one GPU is our engine of one process.
    """

    layers: int = 4
    batch: int = 4
    seqlen: int = 4096
    gpus: int = 2
    zero: int = 2
    expert_parallel: int = 1
    sequence_parallel: int = 1
    checkpointing: Recomputation = "none"
    moments: Literal["float32", "bfloat16", "8bit"] = "float32"
    master_weights: bool = True
    offload: bool = False
    model: str = "Qwen3-30B-A3B"

    @property
    def tokens(self) -> float:
        """Of one GPU."""
        return self.batch * self.seqlen / self.sequence_parallel

    def optimizer(self) -> OptimizerConfig:
        """How the state is kept."""
        return OptimizerConfig(moments=self.moments, master_weights=self.master_weights, offload=self.offload)

    def distributed(self) -> DistributedConfig:
        """tilestack's configuration of it."""
        if self.gpus == 1:
            return DistributedConfig(engine="local")
        split = {"expert_parallel": self.expert_parallel, "sequence_parallel": self.sequence_parallel}
        return DistributedConfig(engine="deepspeed", zero=self.zero, **split)


@dataclass(frozen=True)
class Job:
    """One measurement; kind: "step", "links" or "failures"."""

    implementation: str
    case: Case
    repeats: int
    kind: str = "step"


def jobs_of(gpus: int, layers: int, large: int, repeats: int) -> list[Job]:
    """What is measured, what matters most first: a run may be stopped at a time limit.

    layers: of the small model, which one GPU trains too; large: of the one that needs them all. What fills the memory
    comes late, when the processes of jobs before are gone.
    """
    small, big, deep = (Case(layers=each, gpus=gpus) for each in (layers, large, 12))
    rows = replace(deep, batch=1, sequence_parallel=gpus, checkpointing="selective", moments="8bit")
    # each GPU has as much as one of four that train all 48 layers
    quarter = Case(
        12 * gpus, gpus=gpus, expert_parallel=gpus, checkpointing="full", moments="8bit", master_weights=False
    )
    links, failures = (
        Job(name, Case(layers=0, batch=0, seqlen=0, gpus=gpus), repeats, kind)
        for name, kind in (("nccl", "links"), ("tilestack", "failures"))
    )
    first = [
        ("tilestack", replace(small, gpus=1, zero=0)),
        ("tilestack", small),
        ("tilestack", big),
        ("tilestack", replace(big, batch=2)),
        ("tilestack", replace(small, expert_parallel=gpus)),
        (RIVAL, small),
        (RIVAL, replace(big, checkpointing="full")),
    ]
    then = [
        ("tilestack", replace(deep, moments="8bit")),
        ("tilestack", quarter),
        ("tilestack", replace(rows, seqlen=131072)),
        ("tilestack", replace(deep, expert_parallel=gpus, checkpointing="selective")),
        ("tilestack", deep),
        (RIVAL, deep),
        (RIVAL, replace(deep, checkpointing="full")),
        (RIVAL, replace(deep, zero=3, batch=1, checkpointing="full")),
        ("tilestack", replace(small, zero=3)),
        ("tilestack", replace(rows, seqlen=65536)),
        (RIVAL, replace(big, batch=2)),
        ("tilestack", replace(big, expert_parallel=gpus)),
        (RIVAL, replace(small, batch=2)),
        ("tilestack", replace(deep, expert_parallel=gpus, batch=2)),
        (RIVAL, replace(big, zero=3, checkpointing="full")),
        ("tilestack", replace(big, offload=True, checkpointing="full")),
    ]
    made = [[Job(name, case, repeats) for name, case in part] for part in (first, then)]
    return [links, *made[0], failures, *made[1]]  # the first row names the file by its GPUs


def run(gpus: int, layers: int, large: int, repeats: int, only: list[str] | None, folder: Path = FOLDER) -> Path:
    """Measure everything on `gpus` GPUs of this machine; see `run_jobs`."""
    jobs = [job for job in jobs_of(gpus, layers, large, repeats) if not only or job.implementation in only]
    return run_jobs(jobs, folder)


def run_jobs(jobs: list[Job], folder: Path = FOLDER) -> Path:
    """Measure the jobs; prints, and writes the result file, as it goes.

    Raises ValueError where this machine has fewer GPUs.
    """
    gpus = max(job.case.gpus for job in jobs)
    if gpus > torch.cuda.device_count():
        raise ValueError(f"bench distributed: gpus = {gpus}, but this machine has {torch.cuda.device_count()}")
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # for the ranks
    ports = free_ports()
    left = Counter(place_of(job) for job in jobs if job.kind != "failures")
    groups = {place: Ranks(work, place[0], ports, import_all) for place in left}
    harms = start_failures(gpus, ports) if any(job.kind == "failures" for job in jobs) else {}
    limits = ceilings()
    torch.cuda.empty_cache()
    print(f"ceilings: {limits}", flush=True)
    recorder = Recorder("distributed", limits, folder, describe)
    try:
        for job in jobs:
            if job.kind == "failures":
                result: list | str = time_failures(gpus, harms)
            else:
                place = place_of(job)
                result = groups[place].run(job, PATIENCE_S + PATIENCE_OF_A_LAYER_S * job.case.layers)
                left[place] -= 1
                if not left[place]:  # what its processes hold of the GPUs is wanted
                    groups[place].stop()
            failed = Row(job.kind, asdict(job.case), job.implementation, "step", error=result)
            for row in [failed] if isinstance(result, str) else result:
                recorder.add(row)
    finally:
        for group in groups.values():
            group.stop()
        for process in itertools.chain.from_iterable(harms.values()):
            process.kill()
    return recorder.finish()


def place_of(job: Job) -> tuple[int, str, bool]:
    """What jobs that share processes have in common: so many ranks, who runs them, and whether they share rows.

    DeepSpeed learns once a process whether ranks share rows.
    """
    rival = RIVAL if job.implementation == RIVAL else "tilestack"
    return job.case.gpus, rival, job.case.sequence_parallel > 1


def import_all() -> None:
    """What a rank needs, before its turn: the groups start together and are measured one after the other."""
    importlib.import_module("deepspeed")
    importlib.import_module("tilestack.distributed.deepspeed_engine")


def work(job: Job) -> list[Row]:
    """What every rank does for a job; rank 0's rows count."""
    if job.kind == "links":
        start(job.case.distributed())
        return time_links(job)
    try:
        return time_step(job)
    finally:
        free_everything()


def free_everything() -> None:
    """Give the memory of large tensors back: hooks and globals of DeepSpeed keep an engine alive that nobody uses."""
    gc.collect()
    for found in gc.get_objects():
        if type(found) in (torch.Tensor, torch.nn.Parameter) and found.untyped_storage().nbytes() > SMALL_BYTES:
            found.untyped_storage().resize_(0)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def time_step(job: Job, config: transformers.PretrainedConfig | None = None) -> list[Row]:
    """The median of `job.repeats` steps, after some that are not timed."""
    case = job.case
    config = config or qwen3_30b_a3b(case.layers)
    world = start(case.distributed())
    train_step = BUILDERS[job.implementation](case, config)
    batches = itertools.cycle(micro_batches(case, config.vocab_size, world.rank, world.device))
    clock = Clock(world.device)
    began = time.perf_counter()
    losses = [train_step(next(batches))]
    clock.wait()
    cold_s = time.perf_counter() - began
    warmup, traced = (LONG_WARMUP, LONG_PROFILED) if case.tokens > LONG else (WARMUP, PROFILED)
    losses += [train_step(next(batches)) for _ in range(warmup - 1)]
    clock.reset_peak()
    marks = []
    for _ in range(job.repeats):
        marks.append(clock.mark())
        train_step(next(batches))
    times = clock.between([*marks, clock.mark()])
    peak = clock.peak_gib()
    parts = profiled(lambda: train_step(next(batches)), clock, traced)
    median = statistics.median(times)
    flops = training_flops_per_token(config, case.seqlen) * case.tokens
    row = Row(
        op="step", case=asdict(case), implementation=job.implementation, direction="step", ms_median=median,
        ms_min=min(times), ms_max=max(times), tflops=flops / median / 1e9, peak_gib=peak,
        tokens_per_s=case.tokens / median * 1e3, cold_s=cold_s, losses=mean_over_ranks(losses), **parts,
    )  # fmt: skip
    return [row]


def micro_batches(case: Case, vocabulary: int, rank: int, device: torch.device) -> list[dict[str, Any]]:
    """Packed rows of `batch` sequences; ranks that share rows have the same ones."""
    data_rank, data_ranks = case.distributed().data_ranks(rank, case.gpus)
    found = []
    for number in range(MICRO_BATCHES):
        tokens = zipf_tokens(case.batch, case.seqlen, vocabulary, 1000 * data_rank + number, device.type)
        labels = tokens.clone()
        labels[:, 0] = -100
        found.append(
            {
                "input_ids": tokens.view(1, -1),
                "labels": labels.view(1, -1),
                "position_ids": torch.arange(case.seqlen, device=device).repeat(case.batch)[None],
                "cu_seqlens": torch.arange(case.batch + 1, dtype=torch.int32, device=device) * case.seqlen,
                "num_items": data_ranks * case.batch * (case.seqlen - 1),
            }
        )
    return found


def mean_over_ranks(losses: list[torch.Tensor]) -> list[float]:
    """Of steps: each rank's, or already that of all."""
    means = torch.stack(losses).float()
    if dist.is_initialized():
        dist.all_reduce(means)
        means /= dist.get_world_size()
    return means.tolist()


Step = Callable[[dict], torch.Tensor]


def with_tilestack(case: Case, config: transformers.PretrainedConfig) -> Step:
    """Our engine for the case; a step gives the loss of all ranks, without that of the routers."""
    from tilestack import Qwen3MoeForCausalLM

    weights = None
    if case.layers > WHOLE:
        model, weights = outline(config, torch.bfloat16), DrawnInPlace(config.initializer_range)
    else:
        torch.manual_seed(0)
        # drawn on the device, whole: `drawn`, which a training uses, takes the host half a minute here
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            model = Qwen3MoeForCausalLM._from_config(config, dtype=torch.bfloat16)
    arguments = case.optimizer(), case.distributed(), 1, case.checkpointing
    engine: Engine = make_engine(model, *arguments, weights=weights)

    def train_step(batch: dict) -> torch.Tensor:
        result = engine.train_step([batch], LEARNING_RATE)
        return result.loss - config.router_aux_loss_coef * result.aux_loss

    return train_step


def with_plain_deepspeed(case: Case, config: transformers.PretrainedConfig) -> Step:
    """transformers' model under DeepSpeed as its documentation sets it up for speed; a step gives this rank's loss."""
    import deepspeed

    torch.manual_seed(0)
    cuda = torch.cuda.is_available()
    with torch.device("cuda" if cuda else "cpu"):
        model = plain_transformers(config)
    if case.checkpointing != "none":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    chosen = OptimizerConfig()
    adamw = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(chosen.beta1, chosen.beta2), eps=chosen.eps,
        weight_decay=chosen.weight_decay, fused=cuda,
    )  # fmt: skip
    settings = {
        "train_micro_batch_size_per_gpu": case.batch,
        "gradient_accumulation_steps": 1,
        "bf16": {"enabled": True},
        "gradient_clipping": chosen.max_grad_norm,
        "zero_optimization": {"stage": case.zero, "overlap_comm": True, "contiguous_gradients": True},
        "steps_per_print": None,
    }
    engine = deepspeed.initialize(model=model, optimizer=adamw, config=settings, dist_init_required=False)[0]

    def train_step(batch: dict) -> torch.Tensor:
        tokens = batch["input_ids"].view(case.batch, case.seqlen)
        loss = engine(input_ids=tokens, labels=tokens, use_cache=False).loss
        engine.backward(loss)
        engine.step()
        return loss.detach()

    return train_step


BUILDERS: dict[str, Callable[[Case, transformers.PretrainedConfig], Step]] = {
    "tilestack": with_tilestack,
    RIVAL: with_plain_deepspeed,
}


class Clock:
    """Times on the device; on a CPU those of the host."""

    def __init__(self, device: torch.device):
        self.device, self.cuda = device, device.type == "cuda"

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def mark(self) -> torch.cuda.Event | float:
        """This moment on the device."""
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, marks: list) -> list[float]:
        """Milliseconds from each mark to the next."""
        self.wait()
        pairs = itertools.pairwise(marks)
        return [a.elapsed_time(b) if self.cuda else (b - a) * 1e3 for a, b in pairs]

    def reset_peak(self) -> None:
        self.wait()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()

    def peak_gib(self) -> float | None:
        """The largest of all ranks."""
        if not self.cuda:
            return None
        peak = torch.tensor(torch.cuda.max_memory_allocated() / 2**30, device=self.device)
        if dist.is_initialized():
            dist.all_reduce(peak, op=dist.ReduceOp.MAX)
        return peak.item()


def profiled(step: Callable[[], object], clock: Clock, steps: int) -> dict[str, float]:
    """Milliseconds a step of collectives, of collectives that no kernel hides, and without any work; GPU only.

    Every rank runs the steps, the first one's are looked at.
    """
    if not clock.cuda:
        return {}
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(steps):
            step()
        clock.wait()
    spans = list(_spans(profile))
    return {name: value / steps for name, value in shares(spans).items()}


def _spans(profile: torch.profiler.profile) -> Iterator[tuple[str, float, float]]:
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA and event.time_range.end > event.time_range.start:
            yield event.name, event.time_range.start, event.time_range.end


def shares(spans: list[tuple[str, float, float]]) -> dict[str, float]:
    """Of kernels (name, start and end in microseconds): milliseconds of collectives, of unhidden ones, of nothing."""
    if not spans:
        return {}
    window = min(start for _, start, _ in spans), max(end for _, _, end in spans)
    collectives = [(start, end) for name, start, end in spans if "nccl" in name.lower()]
    others = [(start, end) for name, start, end in spans if "nccl" not in name.lower()]
    sent, _ = covered(collectives, window)
    busy, _ = covered(collectives + others, window)
    computing, _ = covered(others, window)
    return {
        "collective_ms": sent / 1e3,
        "exposed_ms": (busy - computing) / 1e3,
        "idle_ms": (window[1] - window[0] - busy) / 1e3,
    }


def time_links(job: Job) -> list[Row]:
    """What a GPU receives from the others in each kind of collective, GB/s: bytes (n - 1) / n over the time."""
    ranks = job.case.gpus
    part = torch.randn(LINK_BYTES // 2 // ranks, device="cuda").bfloat16()
    whole = torch.randn(LINK_BYTES // 2, device="cuda").bfloat16()
    landed = torch.empty_like(whole)
    calls = {
        "all_gather": lambda: dist.all_gather_into_tensor(whole, part),
        "reduce_scatter": lambda: dist.reduce_scatter_tensor(part, whole),
        "all_reduce": lambda: dist.all_reduce(whole),
        "all_to_all": lambda: dist.all_to_all_single(landed, whole),
    }
    clock, rows = Clock(torch.device("cuda")), []
    for name, call in calls.items():
        for _ in range(WARMUP):
            call()
        marks = []
        for _ in range(job.repeats):
            marks.append(clock.mark())
            call()
        times = clock.between([*marks, clock.mark()])
        median = statistics.median(times)
        received = whole.nbytes * (ranks - 1) / ranks * (2 if name == "all_reduce" else 1)
        case = {"collective": name, "bytes": whole.nbytes, "gpus": ranks}
        rows.append(Row("link", case, "nccl", "both", median, min(times), max(times), gbps=received / median / 1e6))
        whole.normal_()
    return rows


def state_of(case: dict) -> str:
    """What is not as usual about the optimizer's state, in words."""
    words = {"moments": {"bfloat16": "bfloat16 moments", "8bit": "8-bit moments"}}
    words |= {"master_weights": {False: "no master weights"}, "offload": {True: "state on the host"}}
    said = [found for name, kinds in words.items() if (found := kinds.get(case.get(name)))]
    return "".join(f", {each}" for each in said)


def describe(row: Row) -> str:
    """One line for the terminal."""
    if row.op == "link":
        return f"{row.case['collective']:>15}: {row.gbps:.0f} GB/s"
    case = row.case
    if row.op == "failure":
        took = "never ended" if row.ms_median is None else f"{row.ms_median / 1e3:.1f} s until all had ended"
        return f"{'a rank ' + case['harm']:>15}: {took}" + (f": {row.error}" if row.error else "")
    what = f"{row.implementation:25} {case['gpus']} GPUs, {case['layers']} layers, {case['batch']} x {case['seqlen']}, "
    what += f"ZeRO-{case['zero']}, experts / {case['expert_parallel']}, rows / {case['sequence_parallel']}, "
    what += f"checkpointing {case['checkpointing']}{state_of(case)}"
    if row.error:
        return f"{what}: {row.error}"
    hidden = (
        ""
        if row.collective_ms is None
        else (f", collectives {row.collective_ms:.1f} ms ({row.exposed_ms:.1f} exposed), idle {row.idle_ms:.1f} ms")
    )
    return (
        f"{what}: {row.ms_median:.1f} ms ({row.ms_min:.1f} to {row.ms_max:.1f}), {row.tokens_per_s:.0f} tokens/s, "
        f"{row.tflops:.0f} TFLOP/s a GPU, {row.peak_gib or 0:.1f} GiB, first call {row.cold_s:.1f} s{hidden}"
    )
