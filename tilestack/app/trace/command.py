"""The command line of `tilestack trace`, and what it does: record, work out, show, write."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import shlex
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from tilestack.app.ceilings import ceilings
from tilestack.app.config import Config, check
from tilestack.app.data.documents import open_source
from tilestack.app.data.packing import PackedLoader, StepBatch
from tilestack.app.data.tokenizer import open_tokenizer
from tilestack.app.errors import UserError, out_of_memory
from tilestack.app.explain import facts
from tilestack.app.files import write_text
from tilestack.app.hardware import describe
from tilestack.app.model import build, check_checkpoint, model_config, parameters
from tilestack.app.parse import take_option, to_plain
from tilestack.app.schedule import learning_rate
from tilestack.app.start import configure
from tilestack.app.trace.page import page
from tilestack.app.trace.recording import DATA, Recording, record
from tilestack.app.trace.rival import as_transformers_likes_it, build_plain, sums_of_weights
from tilestack.app.trace.summary import Step, summarise
from tilestack.app.trace.terminal import Progress, show
from tilestack.distributed import Engine, World, make_engine, start
from tilestack.distributed.local import LocalEngine
from tilestack.models.flops import training_flops_per_token

USAGE = """usage: tilestack trace [--config FILE] [--compare transformers] [--steps N] [--GROUP.KEY VALUE ...]

Runs a few training steps of a configuration under torch's profiler and draws the design's picture with what really
ran: for each box of the stack its ops and who computes them, their kernels (tilestack's, cuBLAS, cuDNN, NCCL, PyTorch's
own), time, share, and the rates that they reach beside those that this device reaches for a matrix product and a copy.
Needs no GPU: on a CPU the operators of PyTorch take the place of kernels.

  --compare transformers   run plain transformers too: its untouched model on the same weights, data and optimizer
  --steps N                steps under the profiler whose means are reported (default 3); one more is thrown away
  --warmup N               steps before any other (default 3), the first compiles the kernels; then five are timed
                           without the profiler
  --out FOLDER             where trace.html and trace.json go (default: a new folder in output.folder)
  others                   the options of tilestack train

examples:
  tilestack trace                                          the preset for this machine
  tilestack trace --config my.yaml --compare transformers
  tilestack trace --data.micro_batch_tokens 8192 --model.activation_checkpointing full
  torchrun --nproc-per-node 2 --no-python tilestack trace --distributed.zero 2     the first process is traced

How to read it: shares are of the time in which the device works, so they add up to 100%; what the profile cannot place
is in a box of its own. "of ceiling" is the least time that the arithmetic or the traffic of an op allows on this
device, over the time that it took. The profiler slows the host: the time of a step without it stands beside."""
RIVAL = "transformers"
FORMAT = 1


def main(argv: list[str]) -> int:
    """The command line; returns the exit code. Raises UserError for wrong input."""
    if "-h" in argv or "--help" in argv:
        print(USAGE)
        return 0
    command = shlex.join(["tilestack", "trace", *argv])
    compare, argv = take_option(argv, "compare")
    if compare not in (None, RIVAL):
        raise UserError(f"--compare must be {RIVAL}, got {compare!r}")
    steps, argv = _count(argv, "steps", 3)
    warmup, argv = _count(argv, "warmup", 3)
    out, argv = take_option(argv, "out")
    if take_option(argv, "resume")[0] is not None:
        raise UserError("--resume: trace starts from new weights, or from those of --model.path RUN/export")
    config, _ = configure(argv, prog="tilestack trace")
    world = start(config.distributed)
    check(config, world.world_size)
    check_checkpoint(config)
    if compare and world.world_size > 1:
        raise UserError("--compare transformers runs in one process; start tilestack trace without torchrun")
    folder = _folder(config, out)
    with Progress(quiet=world.rank != 0) as progress:
        found = trace(config, world, compare, warmup, steps, progress.say)
    if world.rank == 0:
        found = {"command": command} | found
        show(found)
        for path in write(found, folder):
            print(f"{path.suffix[1:] + ':':6}{path}")
    return 0


def _count(argv: list[str], name: str, default: int) -> tuple[int, list[str]]:
    value, rest = take_option(argv, name)
    if value is None:
        return default, rest
    if not value.isdecimal() or int(value) < 1:
        raise UserError(f"--{name} must be a whole number of at least 1, got {value!r}")
    return int(value), rest


def _folder(config: Config, out: str | None) -> Path:
    if out is not None:
        return Path(out)
    return Path(config.output.folder) / f"{time.strftime('%Y%m%d-%H%M%S')}-{config.output.name}-trace"


def trace(
    config: Config, world: World, compare: str | None, warmup: int, steps: int, progress: Callable[[str], None]
) -> dict[str, Any]:
    """All that trace.json holds, and the timelines. Every rank calls it; rank 0's is what is reported."""
    progress("reading the text")
    source = open_source(config.data)
    tokenizer = open_tokenizer(config.data, config.model.path, source)
    dtype = getattr(torch, config.model.dtype)
    progress("measuring what the device reaches")
    limits = ceilings(world.device, torch.bfloat16 if world.device.type == "cuda" else dtype)
    shape = model_config(config, tokenizer)

    def batches() -> Iterator[StepBatch]:
        return iter(
            PackedLoader(
                source,
                tokenizer,
                config.data,
                world.rank,
                world.world_size,
                config.train.micro_batches,
                config.train.seed,
            )
        )

    runs = []
    weights = []
    for name in ["tilestack", *([compare] if compare else [])]:
        progress(f"{name}: building the model")
        try:
            runs.append(_run(name, config, world, tokenizer, batches(), warmup, steps, limits, weights, progress))
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            needed = out_of_memory(error)
            if needed is None or name != RIVAL:
                raise
            runs.append({"name": name, "error": needed.splitlines()[0]})
        gc.collect()
        if world.device.type == "cuda":
            torch.cuda.empty_cache()
    return {
        "format": FORMAT,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": {"name": describe(world.device), "type": world.device.type, "processes": world.world_size},
        "ceilings": limits | {"dtype": "bfloat16" if world.device.type == "cuda" else config.model.dtype},
        "facts": facts(config, shape),
        "configuration": to_plain(config),
        "runs": runs,
    }


def _run(
    name: str,
    config: Config,
    world: World,
    tokenizer: PreTrainedTokenizerBase,
    batches: Iterator[StepBatch],
    warmup: int,
    steps: int,
    limits: dict[str, float],
    weights: list[torch.Tensor],
    progress: Callable[[str], None],
) -> dict[str, Any]:
    """Train a few steps with one model and work out its figures.

    weights: the sums of the weights of the runs before, to which those of this one are added.
    """
    engine = _engine(name, config, world, tokenizer)
    weights.append(sums_of_weights(engine.model))
    if not torch.equal(weights[0], weights[-1]):
        raise AssertionError(f"{name} does not start from the same weights as tilestack")
    seen: list[StepBatch] = []

    def step() -> torch.Tensor:
        with torch.profiler.record_function(DATA):
            batch = next(batches)
            micro = batch.micro_batches
            if name == RIVAL:
                micro = [as_transformers_likes_it(each) for each in micro]
        seen.append(batch)
        lr = learning_rate(config.schedule, config.optimizer.lr, len(seen) - 1, config.train.steps)
        return engine.train_step(micro, lr).loss

    recording = record(
        step, engine.model, engine.device, warmup, steps, traced=world.rank == 0,
        progress=lambda text: progress(f"{name}: {text}"),
    )  # fmt: skip
    if world.rank != 0:
        return {"name": name}
    progress(f"{name}: working out who took the time")
    return {"name": name, "parameters": parameters(engine.model)} | _figures(recording, seen[-steps:], engine, limits)


def _engine(name: str, config: Config, world: World, tokenizer: PreTrainedTokenizerBase) -> Engine:
    # a new model is drawn on the device itself, which is quick; its weights are not those that a training would draw
    drawn = world.device if config.model.path is None else contextlib.nullcontext()
    accumulation = config.train.micro_batches // world.world_size
    if name == RIVAL:
        with drawn:
            model = build_plain(config, tokenizer)
        return LocalEngine(model, config.optimizer, accumulation, world)
    with drawn:
        model = build(config, tokenizer)
    # a replayed step does not say whose its kernels are
    eager = dataclasses.replace(config.distributed, cuda_graphs="off")
    return make_engine(
        model,
        config.optimizer,
        eager,
        accumulation=accumulation,
        activation_checkpointing=config.model.activation_checkpointing,
        activation_offload=config.model.activation_offload,
    )


def _figures(
    recording: Recording, batches: list[StepBatch], engine: Engine, limits: dict[str, float]
) -> dict[str, Any]:
    """The run's figures; batches: those of the steps that are reported."""
    first = batches[0]
    tokens = first.tokens // engine.world_size
    length = sum(each.mean_length for each in batches) / len(batches)
    micro_batches = engine.world_size * len(first.micro_batches)
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


def without_timelines(found: dict[str, Any]) -> dict[str, Any]:
    """The figures alone, which are small."""
    return found | {"runs": [{k: v for k, v in run.items() if k != "timeline"} for run in found["runs"]]}


def write(found: dict[str, Any], folder: Path) -> list[Path]:
    """Write trace.html and trace.json (without the timelines) into `folder`; returns their paths."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out: {folder} cannot be made: {error}") from None
    write_text(folder / "trace.html", page(found))
    write_text(folder / "trace.json", json.dumps(without_timelines(found), indent=1) + "\n")
    return [folder / "trace.html", folder / "trace.json"]
