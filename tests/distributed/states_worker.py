"""What torchrun starts for test_optimizer_states.py: the tiny model in bfloat16 with each way of keeping the state.

usage: states_worker.py FOLDER SETTING..., as "3-8bit-bare": the ZeRO stage, then any of "experts" (the ranks share
them), "bfloat16" or "8bit" (moments), "bare" (no master weights), "offload", "once" (one micro-batch a rank and step).
Every rank writes FOLDER/<rank>.json.
"""

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from distributed.tiny import global_step, tiny_model
from distributed.worker import weights_of
from tilestack.distributed import DistributedConfig, OptimizerConfig, make_engine, start
from tilestack.distributed.zero_step import OnePassZeroOptimizer

STEPS = 5


def chosen(setting: str, ranks: int) -> tuple[DistributedConfig, OptimizerConfig]:
    zero, *words = setting.split("-")
    moments = next((word for word in words if word in ("bfloat16", "8bit")), "float32")
    distributed = DistributedConfig(
        engine="deepspeed", zero=int(zero), expert_parallel=ranks if "experts" in words else 1
    )
    optimizer = OptimizerConfig(
        lr=1e-2, max_grad_norm=0.5, moments=moments, master_weights="bare" not in words, offload="offload" in words
    )
    return distributed, optimizer


def made(setting: str):
    distributed, optimizer = chosen(setting, int(os.environ["WORLD_SIZE"]))
    start(distributed)
    return make_engine(tiny_model(torch.bfloat16), optimizer, distributed, micro_batches(setting))


def micro_batches(setting: str) -> int:
    return 1 if "once" in setting else 2


def train(engine, setting: str, first: int, last: int) -> list[float]:
    ranks, results = engine.world_size, []
    for step in range(first, last):
        batches = global_step(step, ranks * micro_batches(setting))[engine.rank :: ranks]
        results.append(engine.train_step(batches, lr=1e-2).loss.item())
    return results


def state_bytes(engine) -> dict[str, int]:
    """What this rank holds: the model's weights, the flat tensors that are updated, moments and scales, gradients."""
    base = engine.engine.basic_optimizer
    moments = dict.fromkeys(("moments", "scales"), 0)
    for state in base.state.values():
        for name, each in state.items():
            if isinstance(each, torch.Tensor) and name != "step":
                moments["scales" if name.endswith("scale") else "moments"] += each.nbytes
    own = [getattr(each, "ds_tensor", each) for each in engine.model.parameters()]
    found = {"model": sum(each.nbytes for each in own), "updated": sum(flat.nbytes for flat in base.state)}
    if engine.stage == 3:
        found["gradients"] = engine.engine.optimizer.grad_partitions_flat_buffer.nbytes
    return found | moments


@contextlib.contextmanager
def units_in_flight(zero: OnePassZeroOptimizer, found: list[int]) -> Iterator[None]:
    """Collects the bytes that travel when a layer's experts make their gradients."""
    process, seen = type(zero).process_gradients, []

    def processed(parameter, index):
        if parameter.dim() == 3:
            seen.append(index)
            if len(seen) % 2:
                found.append(sum(whole.nbytes for _, _, _, whole in zero._travelling))
        process(zero, parameter, index)

    zero.process_gradients = processed
    yield
    del zero.process_gradients


@contextlib.contextmanager
def gradients_on_their_way(engine) -> Iterator[dict]:
    """Collects what DeepSpeed takes to reduce gradients and to update.

    "filled": elements of each bucket that is reduced (ZeRO 0 and 1: of each piece). "buckets": bytes of all buckets.
    "reduced", "updated": the bytes of each flat copy of gradients that is made for it.
    "in flight": our ZeRO 2: bytes that travel when the first gradient of each layer's experts is there.
    """
    zero, reducing = engine.engine.optimizer, []
    found = {"filled": [], "reduced": [], "updated": [], "buckets": 0, "in flight": []}
    if isinstance(zero, OnePassZeroOptimizer):
        with units_in_flight(zero, found["in flight"]):
            yield found
        found["buckets"] = sum(each.nbytes for bucket in zero.ipg_buckets.values() for each in bucket.buffer)
        return
    in_buckets = hasattr(zero, "average_tensor")
    owner, method = (zero, "average_tensor") if in_buckets else (engine.engine, "allreduce_bucket")
    reduce, flatten = getattr(owner, method), getattr(zero, "flatten", None)

    def reduced(gradients, *arguments):
        if in_buckets:
            found["filled"].append(gradients.numel())
            found["buckets"] = sum(each.nbytes for bucket in zero.ipg_buckets.values() for each in bucket.buffer)
        else:
            found["filled"].append(sum(each.numel() for each in gradients))
        reducing.append(True)
        result = reduce(gradients, *arguments)
        reducing.pop()
        return result

    def flattened(tensors):
        flat = flatten(tensors)
        if all(flat.untyped_storage().data_ptr() != each.untyped_storage().data_ptr() for each in tensors):
            found["reduced" if reducing else "updated"].append(flat.nbytes)
        return flat

    if engine.stage == 3:
        found["buckets"] = sum(bucket.buffer.nbytes for bucket in zero.ipg_buckets.values())
    setattr(owner, method, reduced)
    zero.flatten = flattened
    yield found
    setattr(owner, method, reduce)
    zero.flatten = flatten


def run(folder: Path, setting: str) -> dict:
    engine = made(setting)
    found = {"losses": train(engine, setting, 0, 3)}
    checkpoint = folder / setting
    checkpoint.mkdir(exist_ok=True)
    engine.save(checkpoint)
    with gradients_on_their_way(engine) as found["on their way"]:
        found["losses"] += train(engine, setting, 3, 4)
    found["losses"] += train(engine, setting, 4, STEPS)
    found["bytes"] = state_bytes(engine)
    resumed = made(setting)
    resumed.load(checkpoint)
    found["resumed"] = train(resumed, setting, 3, STEPS)
    weights, again = weights_of(engine), weights_of(resumed)
    found["same weights"] = all(torch.equal(weights[name], again[name]) for name in weights)
    found["dtypes"] = sorted({str(each.dtype) for each in weights.values()})
    return found


def main() -> None:
    folder, settings = Path(sys.argv[1]), sys.argv[2:]
    results = {}
    for setting in settings:
        results[setting] = run(folder, setting)
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(results))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
