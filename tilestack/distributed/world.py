"""This process among all: its rank, how many there are, and the device it computes on."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

import torch


class LaunchError(RuntimeError):
    """Training cannot start on this machine as it was asked to; the message says what to install or to change."""


@dataclass(frozen=True)
class World:
    """This process among all: its rank, how many there are, and the device it computes on."""

    rank: int
    world_size: int
    device: torch.device


def current_world() -> World:
    """Who this process is, from the variables that torchrun sets (or `take_up_slurm`); alone if there are none.

    Raises LaunchError if a GPU is missing for a process of this machine.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise LaunchError(
                f"process {local_rank} of this machine has no GPU of its own: there are {torch.cuda.device_count()}; "
                f"start at most as many processes (torchrun --nproc-per-node {torch.cuda.device_count()}; srun with "
                "--gpus-per-node, so that each process sees all GPUs of its node)"
            )
        device = torch.device("cuda", local_rank)
    return World(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)), device)


def take_up_slurm() -> None:
    """Set torchrun's variables from those of `srun`, where this process is a task of one and torchrun set none.

    The first node of the step is where the processes meet, at a port that the job's number gives, unless MASTER_ADDR
    and MASTER_PORT say otherwise.

    Raises LaunchError if that node cannot be read from the list.
    """
    given = os.environ
    if "RANK" in given or int(given.get("SLURM_STEP_NUM_TASKS", 1)) == 1:
        return
    if "MASTER_ADDR" not in given:
        nodes = given.get("SLURM_STEP_NODELIST", "")
        found = re.match(r"([^\[,]+)(?:\[(\w+)[^\]]*\]([^\[,]*))?(?=,|$)", nodes)
        if found is None:
            raise LaunchError(
                f"the first node of SLURM_STEP_NODELIST={nodes!r} cannot be read; say where the processes meet: "
                'export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)'
            )
        os.environ["MASTER_ADDR"] = "".join(part or "" for part in found.groups())
    number = int(given.get("SLURM_JOB_ID", 0)) + int(given.get("SLURM_STEP_ID", 0))
    os.environ.setdefault("MASTER_PORT", str(20000 + number % 10000))
    os.environ["RANK"], os.environ["LOCAL_RANK"] = given["SLURM_PROCID"], given["SLURM_LOCALID"]
    os.environ["WORLD_SIZE"] = given["SLURM_STEP_NUM_TASKS"]
    tasks = re.match(r"\d+", given.get("SLURM_STEP_TASKS_PER_NODE", ""))  # "4(x2)": 4 on each of 2 nodes
    if tasks is not None:
        os.environ.setdefault("LOCAL_WORLD_SIZE", tasks[0])
