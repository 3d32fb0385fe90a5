"""The few things that the processes of a run must agree on. With one process each is trivial."""

from __future__ import annotations

import torch
from torch import distributed


def from_rank_0(value: int, device: torch.device) -> int:
    """The number that rank 0 gives."""
    if not distributed.is_initialized():
        return value
    shared = torch.tensor([value], dtype=torch.int64, device=device)
    distributed.broadcast(shared, src=0)
    return int(shared.item())


def any_rank(value: bool, device: torch.device) -> bool:
    """True if it is true on some rank; waits for the device."""
    if not distributed.is_initialized():
        return value
    shared = torch.tensor([int(value)], dtype=torch.int64, device=device)
    distributed.all_reduce(shared, op=distributed.ReduceOp.MAX)
    return bool(shared.item())


def wait_for_all() -> None:
    """Return when every rank has come here."""
    if distributed.is_initialized():
        distributed.barrier()
