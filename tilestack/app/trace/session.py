"""From a configuration to the figures of a trace: build the models, run the steps, work out who took the time."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from tilestack.app.ceilings import ceilings
from tilestack.app.config import Config
from tilestack.app.data.documents import Source, open_source
from tilestack.app.data.packing import PackedLoader, StepBatch
from tilestack.app.data.tokenizer import open_tokenizer
from tilestack.app.errors import out_of_memory
from tilestack.app.explain import facts
from tilestack.app.hardware import describe
from tilestack.app.model import build, model_config, parameters
from tilestack.app.parse import to_plain
from tilestack.app.schedule import learning_rate
from tilestack.app.trace.recording import DATA, Recording, record
from tilestack.app.trace.rival import as_transformers_likes_it, build_plain, sums_of_weights
from tilestack.app.trace.summary import Step, summarise
from tilestack.distributed import Engine, World, make_engine
from tilestack.distributed.local import LocalEngine
from tilestack.models.flops import training_flops_per_token

OURS, RIVAL = "tilestack", "transformers"
FORMAT = 1


@dataclass(frozen=True)
class Session:
    """What every run of a trace shares. limits: the device's ceilings; progress: told what is being done."""

    config: Config
    world: World
    source: Source
    tokenizer: PreTrainedTokenizerBase
    limits: dict[str, float]
    warmup: int
    steps: int
    progress: Callable[[str], None]

    def batches(self) -> Iterator[StepBatch]:
        """This rank's steps, from the first on."""
        data, train = self.config.data, self.config.train
        ranks = self.config.distributed.data_ranks(self.world.rank, self.world.world_size)
        return iter(PackedLoader(self.source, self.tokenizer, data, *ranks, train.micro_batches, train.seed))


def trace(
    config: Config, world: World, compare: str | None, warmup: int, steps: int, progress: Callable[[str], None]
) -> dict[str, Any]:
    """All that trace.json holds, and the timelines. Every rank calls it; rank 0's is what is reported."""
    progress("reading the text")
    source = open_source(config.data)
    tokenizer = open_tokenizer(config.data, config.model.path, source)
    progress("measuring what the device reaches")
    dtype = "bfloat16" if world.device.type == "cuda" else config.model.dtype
    limits = ceilings(world.device, getattr(torch, dtype))
    session = Session(config, world, source, tokenizer, limits, warmup, steps, progress)
    runs, weights = [], []
    for name in [OURS, *([compare] if compare else [])]:
        try:
            runs.append(_run(name, session, weights))
        except (RuntimeError, ValueError, MemoryError) as error:
            if name == OURS:
                raise
            said = (out_of_memory(error) or f"{type(error).__name__}: {error}").splitlines()[0]
            runs.append({"name": name, "error": said})
        gc.collect()
        if world.device.type == "cuda":
            torch.cuda.empty_cache()
    return {
        "format": FORMAT,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": {"name": describe(world.device), "type": world.device.type, "processes": world.world_size},
        "ceilings": limits | {"dtype": dtype},
        "facts": facts(config, model_config(config, tokenizer)),
        "configuration": to_plain(config),
        "runs": runs,
    }


def _run(name: str, session: Session, weights: list[torch.Tensor]) -> dict[str, Any]:
    """Train a few steps with one model and work out its figures.

    weights: the sums of the weights of the runs before, to which those of this one are added.
    """
    session.progress(f"{name}: building the model")
    engine, learned = _engine(name, session)
    weights.append(sums_of_weights(engine.model))
    if not torch.equal(weights[0], weights[-1]):
        raise AssertionError(f"{name} does not start from the same weights as {OURS}")
    batches = session.batches()
    seen: list[StepBatch] = []

    def step() -> torch.Tensor:
        with torch.profiler.record_function(DATA):
            batch = next(batches)
            micro_batches = batch.micro_batches
            if name == RIVAL:
                micro_batches = [as_transformers_likes_it(each) for each in micro_batches]
        # the tensors must go: what is kept of them is page-locked memory, and making more of it stops every launch
        seen.append(dataclasses.replace(batch, micro_batches=[]))
        schedule, train = session.config.schedule, session.config.train
        lr = learning_rate(schedule, session.config.optimizer.lr, len(seen) - 1, train.steps)
        return engine.train_step(micro_batches, lr).loss

    def said(text: str) -> None:
        session.progress(f"{name}: {text}")

    traced = session.world.rank == 0
    recording = record(step, engine.model, engine.device, session.warmup, session.steps, traced, said)
    if not traced:
        return {"name": name}
    said("working out who took the time")
    micro_batches = session.config.train.micro_batches
    figures = _figures(recording, seen[-session.steps :], micro_batches, engine, session.limits)
    return {"name": name, "parameters": learned} | figures


def _engine(name: str, session: Session) -> tuple[Engine, int]:
    """The engine of a run, and how many numbers its model learns, of all ranks: the engine may split the experts."""
    config, world = session.config, session.world
    _, data_ranks = config.distributed.data_ranks(world.rank, world.world_size)
    accumulation = config.train.micro_batches // data_ranks
    if name == RIVAL:
        rival = build_plain(config, session.tokenizer, world.device)
        return LocalEngine(rival, config.optimizer, accumulation, world), parameters(rival)
    model, weights = build(config, session.tokenizer)
    learned = parameters(model)
    # a replayed step does not say whose its kernels are
    eager = dataclasses.replace(config.distributed, cuda_graphs="off")
    engine = make_engine(
        model,
        config.optimizer,
        eager,
        accumulation=accumulation,
        activation_checkpointing=config.model.activation_checkpointing,
        activation_offload=config.model.activation_offload,
        weights=weights,
    )
    return engine, learned


def _figures(
    recording: Recording, batches: list[StepBatch], micro_batches: int, engine: Engine, limits: dict[str, float]
) -> dict[str, Any]:
    """The run's figures; batches: those of the steps that are reported, with `micro_batches` over all ranks."""
    tokens = batches[0].tokens // engine.world_size
    length = sum(each.mean_length for each in batches) / len(batches)
    pairs = sum(each.attended for each in batches) / len(batches) / micro_batches / 2
    flops = tokens * training_flops_per_token(engine.model.config, length)
    found = summarise(recording.trace, engine.device.type == "cuda", Step(tokens, flops, pairs), limits)
    return {
        "step_ms": recording.step_ms,
        "tokens_per_s": tokens / recording.step_ms * 1e3,
        "tflops": flops / recording.step_ms / 1e9,
        "of_ceiling": flops / recording.step_ms / 1e9 / limits["matmul_tflops"],
        "peak_gib": recording.peak_gib,
        "losses": recording.losses,
    } | found
