"""Work for the tests of tilestack.bench.isolated: a module of its own, so that a child imports little."""

import os
import time
from dataclasses import dataclass


@dataclass(frozen=True)
class Job:
    implementation: str
    act: str


def act(job):
    if job.act == "raise":
        raise RuntimeError("cannot")
    if job.act == "die":
        os._exit(7)
    if job.act == "hang":
        time.sleep(600)
    return [job.act]


def act_as_rank(job):
    """As `act`, but on rank 1 alone; the others return their variables."""
    rank = os.environ["RANK"]
    return act(job) if rank == "1" and job.act != "fine" else [rank, os.environ["WORLD_SIZE"]]


def tiny_step(job):
    """A step of `bench distributed` with a tiny model."""
    from distributed.tiny import tiny_config

    from tilestack.bench.distributed import free_everything, time_step

    try:
        return time_step(job, tiny_config())
    finally:
        free_everything()
