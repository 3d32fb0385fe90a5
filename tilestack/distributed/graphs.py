"""A training step of one GPU as CUDA graphs: what the host would enqueue kernel by kernel, it launches at once.

A small model's kernels take less time than their launches. The forward and backward of a micro-batch are recorded once
for each shape, and so is the update; later steps copy their numbers into the tensors that the recorded kernels read,
and replay. The kernels are those of the eager step in the same order.

What a recorded kernel reads must stay where it is: input, sums, gradients, learning rate. Documents differ in number,
so their offsets are padded with empty documents at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from tilestack.distributed.engine import MicroBatch, StepResult
from tilestack.distributed.objective import StepSums
from tilestack.kernels.adamw.op import AdamWParams

if TYPE_CHECKING:
    from tilestack.distributed.local import LocalEngine

FEWEST_DOCUMENTS = 32  # offsets are padded to a power of two of at least this many documents
WARM_UP = 2  # eager runs of a shape before it is recorded: they compile kernels and allocate workspaces
HOST_BOUND = 0.8  # of a micro-batch's time: if the host takes more, recording pays


class Recorded:
    """What `function` does to tensors that stay where they are, recorded on a GPU and launched again by `replay`."""

    def __init__(self, function: Callable[[], Any], pool: Any):
        self._graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        # other threads (a data loader's) may go on calling CUDA meanwhile
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            function()

    def replay(self) -> None:
        """Launch it again."""
        self._graph.replay()


class StepGraphs:
    """Recorded steps of an engine. `train_step` is the engine's own, replayed.

    Raises whatever recording raises; the engine then goes on without.
    """

    def __init__(self, engine: LocalEngine, record: Callable[[Callable[[], Any], Any], Any] = Recorded):
        self.engine = engine
        self.record = record
        self.pool = torch.cuda.graph_pool_handle() if engine.device.type == "cuda" else None
        self.sums = StepSums(engine.model, engine.accumulation, engine.device)
        self.inputs: dict[tuple[int, int], MicroBatch] = {}
        self.runs: dict[Any, int] = {}
        self.recorded: dict[Any, Any] = {}
        self.scalars = {decay: torch.zeros(4, device=engine.device) for decay in (0.0, engine.optimizer.weight_decay)}
        self.grad_norm = torch.zeros((), device=engine.device)
        for slot in engine.slots.values():
            if slot.grad is None:  # gradients are added to what lies here, also those of a single micro-batch
                slot.parameter.grad = torch.zeros_like(slot.parameter)

    def release(self) -> None:
        """Give up the recorded steps; the gradients are as before a step."""
        self.recorded.clear()
        for slot in self.engine.slots.values():
            slot.parameter.grad = None
            if slot.grad is not None:
                slot.grad.zero_()

    def train_step(self, micro_batches: Sequence[MicroBatch], lr: float) -> StepResult:
        """The engine's step."""
        self.sums.sums.zero_()
        for batch in micro_batches:
            key, inputs = self._stage(batch)
            self._run(key, lambda inputs=inputs: self.sums.forward(inputs).backward())
        self._set_scalars(lr)
        self._run("update", self._update)
        return self.sums.result(self.grad_norm.clone())

    def _run(self, key: Any, function: Callable[[], Any]) -> None:
        if key in self.recorded:
            self.recorded[key].replay()
            return
        self.runs[key] = self.runs.get(key, 0) + 1
        if self.runs[key] > WARM_UP:
            self.recorded[key] = self.record(function, self.pool)  # recording computes nothing
            self.recorded[key].replay()
        else:
            function()

    def _stage(self, batch: MicroBatch) -> tuple[tuple[int, int], MicroBatch]:
        """The micro-batch in tensors that stay where they are, one set for each shape."""
        tokens, documents = batch["input_ids"].shape[1], len(batch["cu_seqlens"]) - 1
        capacity = max(FEWEST_DOCUMENTS, 1 << (documents - 1).bit_length())
        offsets = torch.nn.functional.pad(batch["cu_seqlens"], (0, capacity - documents), value=tokens)
        given = {**batch, "cu_seqlens": offsets, "num_items": torch.as_tensor(batch["num_items"])}
        key = (tokens, capacity)
        if key not in self.inputs:
            self.inputs[key] = {name: each.to(self.engine.device, copy=True) for name, each in given.items()}
        for name, tensor in given.items():
            self.inputs[key][name].copy_(tensor, non_blocking=True)
        return key, self.inputs[key]

    def _set_scalars(self, lr: float) -> None:
        self.engine.updates += 1
        o = self.engine.optimizer
        for decay, scalars in self.scalars.items():
            made = AdamWParams(self.engine.updates, lr, o.beta1, o.beta2, o.eps, decay).scalars()
            scalars.copy_(torch.tensor(made), non_blocking=True)

    @torch.no_grad()
    def _update(self) -> None:
        self.grad_norm.copy_(self.engine.grad_norm())
        self.engine.update(0.0, self.grad_norm, self.scalars)
        torch._foreach_zero_([slot.gradient() for slot in self.engine.slots.values()])
