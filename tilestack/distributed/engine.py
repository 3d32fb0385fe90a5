"""What every engine can do: the contract."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from tilestack.distributed.checkpoint import Saving

MicroBatch = dict[str, torch.Tensor | int]


@dataclass(frozen=True)
class StepResult:
    """What one step measured, reduced over micro-batches and ranks: the same numbers on every rank.

    All are detached float32 tensors on the engine's device. Reading one waits for the device.

    loss: scalar, the objective: sum of token losses / num_items + router_aux_loss_coef * aux_loss.
    aux_loss: scalar, the load-balancing loss, mean over micro-batches and ranks; 0 without MoE layers.
    grad_norm: scalar, the global 2-norm of the gradient before clipping. If it is not finite, no weight was changed.
    expert_load: [E], the share of the routes that each expert got, over all MoE layers; sums to 1. None without any.
    """

    loss: torch.Tensor
    aux_loss: torch.Tensor
    grad_norm: torch.Tensor
    expert_load: torch.Tensor | None


class Engine(Protocol):
    """A model with its optimizer, on one process or many.

    Micro-batches are dicts: input_ids [1, T] int64; labels [1, T] int64 as transformers takes them (not shifted, -100
    is ignored); position_ids [1, T]; cu_seqlens [n + 1] int32, where the documents begin; and num_items, the number of
    labels that count in the whole step, over all micro-batches and ranks (a number, or a scalar tensor).
    """

    rank: int
    world_size: int
    device: torch.device
    model: torch.nn.Module

    def train_step(self, micro_batches: Sequence[MicroBatch], lr: float) -> StepResult:
        """Gradients of `accumulation` micro-batches of this rank, clipping, and one update at learning rate `lr`.

        Raises ValueError if the number of micro-batches is not the engine's.
        """
        ...

    def evaluate(self, batches: Iterable[MicroBatch]) -> float:
        """Mean loss per label over the batches of all ranks, without the load-balancing loss; waits for the device.

        Every rank gives its own batches, and as many of them as every other rank (ValueError otherwise: under ZeRO-3
        an odd one out would wait for ever). num_items is not needed. NaN if there is no label at all.
        """
        ...

    def saving(self) -> Saving:
        """This rank's part of a checkpoint as it is now, to be copied or written before the next step."""
        ...

    def save(self, folder: Path) -> None:
        """Write weights and the optimizer's state into `folder`, which exists; every rank calls it."""
        ...

    def load(self, folder: Path) -> None:
        """Take up what `save` wrote, on any number of ranks under any split; every rank calls it.

        Raises CheckpointError, on every rank if on one.
        """
        ...

    def export(self, folder: Path) -> None:
        """Write the model as a Hugging Face checkpoint in the hub's layout; every rank calls it, rank 0 writes.

        One parameter at a time is whole on a device, and one file's weights in rank 0's memory.
        """
        ...
