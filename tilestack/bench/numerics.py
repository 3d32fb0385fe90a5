"""`tilestack bench numerics`: is a training with tilestack as close to float32 as one with plain transformers in bf16?

For each of three orders of the same text, one run in float32 (transformers), two of transformers in bf16 (eager and
SDPA attention) and one of tilestack in bf16. All runs of an order start from the same weights (rounded to bf16) and see
the same tokens; loop and optimizer (AdamW, float32 master weights) are the same for all: only the models differ.

What must hold, decided before anything was measured: let d(t) be a run's loss minus that of the float32 run of the same
order, and D(t) its mean over the last WINDOW steps. The envelope E(t) is the largest |D(s)|, s <= t, over all bf16 runs
of transformers. tilestack passes if |D(t)| <= FACTOR * E(t) for every order and every step. FACTOR is the 2 of the rule
for single ops (testing/compare.py). It cannot be 1: of nine runs that differ by chance alone, one of the three of
tilestack is the farthest with probability 1/3. How many steps lie inside E itself is reported beside it.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

from tilestack import Qwen3MoeForCausalLM
from tilestack.app.config import DataConfig, ModelConfig, ScheduleConfig
from tilestack.app.data.documents import open_source
from tilestack.app.data.packing import MicroBatch, pack, tokenize
from tilestack.app.data.tokenizer import open_tokenizer
from tilestack.app.model import new_config
from tilestack.app.schedule import learning_rate
from tilestack.app.trace.rival import PlainTransformers, as_transformers_likes_it
from tilestack.bench.isolated import side_by_side
from tilestack.bench.results import FOLDER, Row, write
from tilestack.bench.timing import ceilings
from tilestack.distributed import OptimizerConfig, World
from tilestack.distributed.local import LocalEngine

WINDOW, FACTOR = 20, 2
PATIENCE_S = 240.0  # of one run, its compiling included
FLOAT32, OURS = "transformers float32", "tilestack"
# attention and experts of transformers' runs; eager experts would wait for the GPU once for each expert
RIVALS = {
    FLOAT32: ("eager", "grouped_mm"),
    "transformers eager": ("eager", "grouped_mm"),
    "transformers sdpa": ("sdpa", "grouped_mm"),
}


@dataclass(frozen=True)
class NumericsCase:
    """The model, the text and the run. A step has `batch` sequences of `seqlen` tokens; `orders` are seeds."""

    layers: int = 4
    hidden: int = 1024
    heads: int = 16
    kv_heads: int = 2
    head_dim: int = 128
    experts: int = 32
    top_k: int = 4
    expert_hidden: int = 384
    vocabulary: int = 8192
    batch: int = 8
    seqlen: int = 512
    steps: int = 200
    lr: float = 1e-3
    warmup: int = 20
    orders: tuple[int, ...] = (0, 1, 2)

    def as_dict(self, order: int) -> dict:
        """What a row of the result file says of it."""
        names = ("layers", "hidden", "experts", "top_k", "vocabulary", "batch", "seqlen", "steps", "lr")
        return {name: getattr(self, name) for name in names} | {"order": order, "gpus": 1}

    def shape(self, vocabulary: int) -> transformers.Qwen3MoeConfig:
        """transformers' configuration of the model, with the load-balancing loss on."""
        model = ModelConfig(
            layers=self.layers, hidden=self.hidden, heads=self.heads, kv_heads=self.kv_heads, head_dim=self.head_dim,
            experts=self.experts, experts_per_token=self.top_k, expert_hidden=self.expert_hidden,
            max_positions=self.seqlen,
        )  # fmt: skip
        return new_config(model, vocabulary, end_of_text=0)


def text(case: NumericsCase, order: int) -> tuple[int, list[MicroBatch]]:
    """The size of the vocabulary, and the batches of an order: Python's language reference, without gaps."""
    data = DataConfig(vocab_size=case.vocabulary, eval_documents=4)
    source = open_source(data)
    tokenizer = open_tokenizer(data, None, source)
    tokens_of = functools.cache(lambda document: tokenize(tokenizer, document))  # every epoch has the same documents

    def stream() -> Iterator[int]:
        for epoch in itertools.count():
            for document in source.epoch(order, epoch, 0):
                yield from tokens_of(document)

    tokens, batches = stream(), []
    for _ in range(case.steps):
        batch = pack([list(itertools.islice(tokens, case.seqlen)) for _ in range(case.batch)])
        batches.append(batch | {"num_items": case.batch * (case.seqlen - 1)})
    return len(tokenizer), batches


def start_weights(shape: transformers.Qwen3MoeConfig, device: torch.device) -> dict[str, torch.Tensor]:
    """The weights that every run starts from: drawn in float32, then rounded to bf16."""
    torch.manual_seed(0)
    with device:
        model = transformers.Qwen3MoeForCausalLM._from_config(shape, dtype=torch.float32)
    return {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}


def build(
    name: str, shape: transformers.Qwen3MoeConfig, weights: dict[str, torch.Tensor], device: torch.device
) -> torch.nn.Module:
    """The model of a run, with the weights."""
    dtype = torch.float32 if name == FLOAT32 else torch.bfloat16
    with device:
        if name == OURS:
            model = inner = Qwen3MoeForCausalLM._from_config(shape, dtype=dtype)
        else:
            attention, experts = RIVALS[name]
            inner = transformers.Qwen3MoeForCausalLM._from_config(
                shape, dtype=dtype, attn_implementation=attention, experts_implementation=experts
            )
            model = PlainTransformers(inner)
    inner.load_state_dict(weights)
    return model


def losses(
    name: str, model: torch.nn.Module, batches: list[MicroBatch], case: NumericsCase, device: torch.device
) -> list[float]:
    """The loss of every step of one run."""
    engine = LocalEngine(model, OptimizerConfig(lr=case.lr), 1, World(0, 1, device))
    schedule = ScheduleConfig(decay="constant", warmup_steps=case.warmup)
    found = []
    for step, batch in enumerate(batches):
        micro_batch = batch if name == OURS else as_transformers_likes_it(batch)
        found.append(engine.train_step([micro_batch], learning_rate(schedule, case.lr, step, case.steps)).loss)
    return torch.stack(found).tolist()


def smoothed(values: list[float], reference: list[float]) -> list[float]:
    """D(t): the mean of the last WINDOW differences, for every step that has so many before it."""
    differences = [value - other for value, other in zip(values, reference, strict=True)]
    window = min(WINDOW, len(differences))
    return [sum(differences[at : at + window]) / window for at in range(len(differences) - window + 1)]


@dataclass(frozen=True)
class Verdict:
    """What the criterion says of the runs of a result file.

    deviations: D(t) of every bf16 run, by (order, name). envelope: E(t).
    worst: for each order, the largest |D(t)| / E(t) of tilestack. inside: the share of its steps with |D(t)| <= E(t).
    """

    deviations: dict[tuple[int, str], list[float]]
    envelope: list[float]
    worst: dict[int, float]
    inside: float

    @property
    def passed(self) -> bool:
        return max(self.worst.values()) <= FACTOR


def judge(runs: dict[tuple[int, str], list[float]]) -> Verdict:
    """Hold tilestack's losses against the envelope. runs: the losses by (order, name)."""
    deviations = {
        (order, name): smoothed(values, runs[order, FLOAT32])
        for (order, name), values in runs.items()
        if name != FLOAT32
    }
    rivals = [values for (_, name), values in deviations.items() if name != OURS]
    farthest = (max(abs(value) for value in at) for at in zip(*rivals, strict=True))
    envelope = list(itertools.accumulate(farthest, max))
    ratios = {
        order: [abs(value) / edge for value, edge in zip(values, envelope, strict=True)]
        for (order, name), values in deviations.items()
        if name == OURS
    }
    every = list(itertools.chain(*ratios.values()))
    inside = sum(ratio <= 1 for ratio in every) / len(every)
    return Verdict(deviations, envelope, {order: max(each) for order, each in ratios.items()}, inside)


def losses_of(rows: list[dict]) -> dict[tuple[int, str], list[float]]:
    """The losses in the rows of a result file, by (order, name)."""
    return {(row["case"]["order"], row["implementation"]): row["losses"] for row in rows}


@dataclass(frozen=True)
class Job:
    """One run: an order of the text, and who trains on it."""

    case: NumericsCase
    order: int
    implementation: str
    device: str


def jobs_of(case: NumericsCase, device: str) -> list[Job]:
    """All runs of a case."""
    return [Job(case, order, name, device) for order in case.orders for name in (*RIVALS, OURS)]


def train(job: Job) -> list[float]:
    """The losses of one run."""
    torch.set_num_threads(1)  # the others want the cores too
    case, device = job.case, torch.device(job.device)
    vocabulary, batches = text(case, job.order)
    shape = case.shape(vocabulary)
    model = build(job.implementation, shape, start_weights(shape, device), device)
    return losses(job.implementation, model, batches, case, device)


def run(case: NumericsCase, folder: Path = FOLDER) -> Path:
    """Train all runs on the GPU, print the verdict, write the result file.

    The orders are side by side, each in a process of its own: a small model leaves the GPU idle most of the time. More
    processes would take longer: they take turns on the GPU, and float32 waits for it in every product of the experts.
    """
    limits = ceilings()
    torch.cuda.empty_cache()
    runs = {}
    jobs = jobs_of(case, "cuda")
    groups = [[job for job in jobs if job.order == order] for order in case.orders]
    for job, found in side_by_side(groups, train, PATIENCE_S):
        if isinstance(found, str):
            raise RuntimeError(f"order {job.order}, {job.implementation}: {found}")
        runs[job.order, job.implementation] = found
        print(f"order {job.order}, {job.implementation:21} last loss {found[-1]:.4f}", flush=True)
    verdict = judge(runs)
    print(describe(verdict), flush=True)
    rows = [
        Row(
            "numerics", case.as_dict(order), name, "step", losses=values,
            error=verdict.worst[order] if name == OURS else None,
        )
        for (order, name), values in runs.items()
    ]  # fmt: skip
    return write("numerics", rows, limits, folder)


def describe(verdict: Verdict) -> str:
    """The verdict in a line."""
    worst = ", ".join(f"{ratio:.2f} (order {order})" for order, ratio in verdict.worst.items())
    return (
        f"largest |D| / E of tilestack: {worst}; at most {FACTOR} is asked for: "
        f"{'passed' if verdict.passed else 'FAILED'}; {verdict.inside:.0%} of its steps lie inside E"
    )
