"""What torchrun starts for test_splits.py: two steps of the tiny model under one split after another.

usage: splits_worker.py FILE SPLIT..., where a split is ZERO-EXPERTS-ROWS, such as 2-4-1. Rank 0 writes FILE: by split
the losses of two steps, the norm of the gradient, and the gradient of the first step, put together from all ranks.
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from deepspeed.runtime.sequence_parallel import parallel_state_sp
from deepspeed.utils import groups

from distributed.tiny import global_step, tiny_model
from tilestack.distributed import DistributedConfig, OptimizerConfig, make_engine, start

OPTIMIZER = OptimizerConfig(lr=1e-2, max_grad_norm=0.5)


def two_steps(distributed: DistributedConfig, micro_batches: int) -> dict:
    """The losses and the norm of steps of so many micro-batches over all ranks; and the first step's gradient.

    The gradient is what the first moment has after one step, times 10; clipped.
    """
    world = start(distributed)
    rank, ranks = distributed.data_ranks(world.rank, world.world_size)
    engine = make_engine(tiny_model(), OPTIMIZER, distributed, micro_batches // ranks)
    first, second = (global_step(step, micro_batches)[rank::ranks] for step in (0, 1))
    result = engine.train_step(first, lr=1e-2)
    found = {"loss": result.loss.item(), "norm": result.grad_norm.item(), "gradient": first_moments(engine)}
    return found | {"second loss": engine.train_step(second, lr=1e-2).loss.item()}


def first_moments(engine) -> dict[str, torch.Tensor]:
    """Of every parameter, whole: the mean of what the ranks that keep an element say of it; NaN where none does."""
    pieces = list(engine._pieces() if engine.world_size == 1 else engine._state().pieces())
    whole = {name: torch.zeros(2, parameter.numel()) for name, parameter in tiny_model().named_parameters()}
    for piece in pieces:
        moments = piece.tensors["exp_avg"]
        place = whole[piece.name][:, piece.start : piece.start + moments.numel()]
        place += torch.stack([moments, torch.ones_like(moments)])
    for each in whole.values():
        if engine.world_size > 1:
            dist.all_reduce(each)
    return {name: total / count for name, (total, count) in whole.items()}


def main() -> None:
    found = {}
    for split in sys.argv[2:]:
        zero, experts, rows = map(int, split.split("-"))
        # DeepSpeed learns once a process how many ranks share rows; here it may forget
        parallel_state_sp._SEQUENCE_PARALLEL_GROUP = parallel_state_sp._SEQUENCE_DATA_PARALLEL_GROUP = None
        groups.mpu = None
        split_so = {"zero": zero, "expert_parallel": experts, "sequence_parallel": rows}
        distributed = DistributedConfig(engine="deepspeed", **split_so)
        found[split] = two_steps(distributed, int(os.environ["WORLD_SIZE"]))
    if os.environ["RANK"] == "0":
        torch.save(found, Path(sys.argv[1]))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
