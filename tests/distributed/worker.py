"""What torchrun starts for test_deepspeed_engine.py: trains the tiny model under one setting after another.

usage: worker.py FOLDER SETTING..., with a checkpoint in FOLDER/model and a DeepSpeed file own-<zero>.json a stage. A
setting is a ZeRO stage ("3"), one with ranks that share the experts ("2-experts-2"), or the like where all ranks
also share the rows of tokens ("3-rows", "2-experts-2-rows"). DeepSpeed learns of the latter once a process, so settings
with and without it do not go together.
Every rank writes FOLDER/<setting>-rank-<rank>.json.
"""

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from deepspeed.utils import z3_leaf_module

from distributed.tiny import global_step, micro_batch
from tilestack.distributed import DistributedConfig, OptimizerConfig, expert_parallel, make_engine, start
from tilestack.distributed.deepspeed_engine import whole_weights
from tilestack.models import pretrained

STEPS = 5
MICRO_BATCHES = 4  # in a step, over all ranks
OPTIMIZER = OptimizerConfig(lr=1e-2, max_grad_norm=0.5)


def make(folder: Path, distributed: DistributedConfig, dtype=torch.float32, **options):
    world = start(distributed)
    _, data_ranks = distributed.data_ranks(world.rank, world.world_size)
    model, weights = pretrained(folder / "model", dtype)
    return make_engine(model, OPTIMIZER, distributed, MICRO_BATCHES // data_ranks, weights=weights, **options)


def own_share(engine, step: int) -> list[dict]:
    return global_step(step, MICRO_BATCHES)[engine.rank :: engine.world_size]


def train(engine, first: int, last: int) -> list[dict]:
    return [measured(engine.train_step(own_share(engine, step), lr=1e-2)) for step in range(first, last)]


def measured(result) -> dict:
    return {
        "loss": result.loss.item(),
        "aux_loss": result.aux_loss.item(),
        "grad_norm": result.grad_norm.item(),
        "expert_load": result.expert_load.tolist(),
    }


def losses(steps: list[dict]) -> list[float]:
    return [step["loss"] for step in steps]


def weights_of(engine) -> dict[str, torch.Tensor]:
    parts = {}
    for name, _, part in whole_weights(engine.model, keep=True, experts=engine.experts):
        parts.setdefault(name, []).append(part.clone())
    return {name: torch.cat(each) for name, each in parts.items()}


def a_step_that_is_not_finite(engine) -> dict:
    before = weights_of(engine)
    spoil = engine.model.lm_head.register_forward_hook(lambda module, inputs, output: output * float("inf"))
    norm = engine.train_step(own_share(engine, 0), lr=1e-2).grad_norm
    spoil.remove()
    after = weights_of(engine)
    return {
        "norm is finite": bool(torch.isfinite(norm)),
        "weights are the same": all(torch.equal(after[name], before[name]) for name in before),
        "next norm": engine.train_step(own_share(engine, 0), lr=1e-2).grad_norm.item(),
    }


def message(call, *arguments) -> str:
    try:
        call(*arguments)
    except ValueError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


@contextlib.contextmanager
def every_journey() -> Iterator[list]:
    """Collects all that is sent to and from the experts of other ranks."""
    made, plain = [], expert_parallel._Journey.__init__

    def remembered(journey, *arguments):
        made.append(journey)
        plain(journey, *arguments)

    expert_parallel._Journey.__init__ = remembered
    try:
        yield made
    finally:
        expert_parallel._Journey.__init__ = plain


@contextlib.contextmanager
def every_wait() -> Iterator[list]:
    """Collects one entry for each time that the host reads from the device how many rows go where."""
    read, plain = [], expert_parallel.AllToAllDispatcher._plan

    def counted(dispatcher, topk_ids):
        read.append(True)
        return plain(dispatcher, topk_ids)

    expert_parallel.AllToAllDispatcher._plan = counted
    try:
        yield read
    finally:
        expert_parallel.AllToAllDispatcher._plan = plain


def chosen(setting: str, **options) -> DistributedConfig:
    if setting.endswith("-rows"):
        setting, options["sequence_parallel"] = setting.removesuffix("-rows"), int(os.environ["WORLD_SIZE"])
    zero, _, experts = setting.partition("-experts-")
    return DistributedConfig(engine="deepspeed", zero=int(zero), expert_parallel=int(experts or 1), **options)


def run_setting(folder: Path, setting: str) -> dict:
    distributed = chosen(setting)
    checkpoint = folder / f"checkpoint-{setting}"
    engine = make(folder, distributed)
    with every_wait() as waits:
        found = {"steps": train(engine, 0, 3)}
    found["waits"] = {"none": len(waits) / 3}
    checkpoint.mkdir(exist_ok=True)
    engine.save(checkpoint)
    found["steps"] += train(engine, 3, STEPS)
    found["evaluation"] = engine.evaluate([micro_batch(7 + engine.rank), micro_batch(17 + engine.rank)])
    found["uneven evaluation"] = message(engine.evaluate, [micro_batch(7)] * (1 + engine.rank))
    engine.export(folder / f"export-{setting}")
    weights = weights_of(engine)
    if engine.rank == 0:
        torch.save(weights, folder / f"weights-{setting}.pt")
    found["leaves"] = sorted(name for name, module in engine.model.named_modules() if z3_leaf_module(module))

    resumed = make(folder, distributed)
    resumed.load(checkpoint)
    found["resumed"] = train(resumed, 3, STEPS)
    if engine.rank == 0:
        found["files"] = sorted(path.name for path in checkpoint.iterdir())
    found["not finite"] = a_step_that_is_not_finite(resumed)

    low = make(folder, distributed, torch.bfloat16)
    found["bfloat16"] = losses(train(low, 0, 3))
    found["summed in kernels"] = [name for name, p in low.model.named_parameters() if hasattr(p, "gradient_sum")]
    found["bfloat16 not finite"] = a_step_that_is_not_finite(low)
    found["inv_freq"] = [str(low.model.model.rotary_emb.inv_freq.dtype), *low.model.model.rotary_emb.inv_freq.tolist()]

    found["checkpointed"], found["unawaited"] = {}, 0
    for mode in ("full", "selective"):
        with every_journey() as journeys, every_wait() as waits:
            found["checkpointed"][mode] = losses(train(make(folder, distributed, activation_checkpointing=mode), 0, 2))
        found["waits"][mode] = len(waits) / 2
        found["unawaited"] += sum(bool(each._work) for each in journeys)
    own_file = chosen(setting, deepspeed_config=str(folder / f"own-{distributed.zero}.json"))
    found["own file"] = losses(train(make(folder, own_file), 0, 2))
    return found


def run_reshaped(folder: Path, settings: list[str]) -> dict:
    """The last two steps of each setting from the checkpoint of the one before it, or of a single process."""
    found = {}
    for setting, before in zip(settings, [*settings[-1:], *settings[:-1]], strict=True):
        for saved in (before, "alone") if setting in ("3", "2-experts-2") else (before,):
            engine = make(folder, chosen(setting))
            engine.load(folder / f"checkpoint-{saved}")
            found[f"{saved} -> {setting}"] = train(engine, 3, STEPS)
    return found


def run_shared_rows(folder: Path, setting: str) -> dict:
    """All ranks have all micro-batches, and each computes a part of each."""
    engine = make(folder, chosen(setting))
    batches = [global_step(step, MICRO_BATCHES) for step in range(STEPS)]
    found = {"steps": [measured(engine.train_step(each, lr=1e-2)) for each in batches[:3]]}
    checkpoint = folder / f"checkpoint-{setting}"
    checkpoint.mkdir(exist_ok=True)
    engine.save(checkpoint)
    found["steps"] += [measured(engine.train_step(each, lr=1e-2)) for each in batches[3:]]
    found["evaluation"] = engine.evaluate([micro_batch(7), micro_batch(17, lengths=(20, 29))])
    resumed = make(folder, chosen(setting))
    resumed.load(folder / "checkpoint-alone")
    found["from alone"] = [measured(resumed.train_step(each, lr=1e-2)) for each in batches[3:]]
    low = make(folder, chosen(setting), torch.bfloat16)
    found["bfloat16"] = [measured(low.train_step(each, lr=1e-2)) for each in batches[:3]]
    return found


def main() -> None:
    folder, settings = Path(sys.argv[1]), sys.argv[2:]
    shares_rows = settings[0].endswith("-rows")
    run = run_shared_rows if shares_rows else run_setting
    results = {setting: run(folder, setting) for setting in settings}
    if len(settings) > 1 and not shares_rows:
        results["reshaped"] = run_reshaped(folder, settings)
    for name, found in results.items():
        (folder / f"{name}-rank-{os.environ['RANK']}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
