"""This process among all: its rank, how many there are, and the device it computes on."""

from __future__ import annotations

import os
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
    """Who this process is, from the variables that torchrun sets; alone if there are none.

    Raises LaunchError if a GPU is missing for a process of this machine.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise LaunchError(
                f"process {local_rank} of this machine has no GPU of its own: there are {torch.cuda.device_count()}; "
                f"start at most as many processes (torchrun --nproc-per-node {torch.cuda.device_count()})"
            )
        device = torch.device("cuda", local_rank)
    return World(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)), device)
