"""One process, no DeepSpeed: AdamW by our own kernel, and no wait for the device in a step."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from tilestack.distributed.checkpoint import WEIGHT, Piece, Saving, numbers, read_pieces, read_state
from tilestack.distributed.config import OptimizerConfig
from tilestack.distributed.engine import MicroBatch, StepResult
from tilestack.distributed.graphs import HOST_BOUND, StepGraphs
from tilestack.distributed.objective import StepSums, evaluation_sums
from tilestack.distributed.optimizer import new_moments, readable, take_up
from tilestack.distributed.stages import stage
from tilestack.distributed.world import World
from tilestack.kernels import adamw
from tilestack.models import Weights, materialise
from tilestack.models.export import write_model

MEASURED_STEP = 3  # the first two compile kernels
LARGE = 2**22  # elements from which on a gradient's norm is taken alone, at 1.4 times the rate of torch's grouped norm


@dataclass
class _Slot:
    """One parameter with what the optimizer keeps for it.

    moments: as `kernels.adamw` takes them. seed: of the random numbers that it rounds with; each parameter has its own.
    grad: the float32 sum of the micro-batches' bfloat16 gradients, which would lose what they add; None where the
        parameter's own .grad will do.
    """

    parameter: torch.nn.Parameter
    weight_decay: float
    moments: dict[str, torch.Tensor]
    seed: int
    master: torch.Tensor | None
    grad: torch.Tensor | None

    def gradient(self) -> torch.Tensor | None:
        return self.parameter.grad if self.grad is None else self.grad


class LocalEngine:
    """Trains a model in this process. See `Engine` for the contract.

    With bfloat16 weights, master weights and moments are float32 unless `optimizer` says otherwise: 16 bytes a
    parameter with its gradient, 18 with accumulation, where gradients are summed in float32. With float32 weights there
    is no master: 16 bytes.

    weights: what an outline of a model is filled with.
    record_graphs: on a GPU, find out in the third step whether the host keeps it waiting, and if so replay recorded
        steps from then on (graphs.py). Gradients then have memory of their own.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: OptimizerConfig,
        accumulation: int,
        world: World,
        record_graphs: bool = False,
        weights: Weights | None = None,
    ):
        self.rank, self.world_size, self.device = 0, 1, world.device
        if weights is not None:
            materialise(model, weights, self.device)
        self.model = model.to(self.device).train()
        self.optimizer = optimizer
        self.accumulation = accumulation
        self.updates = 0
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.slots = {name: self._slot(p, seed) for seed, (name, p) in enumerate(trained)}
        self.graphs: StepGraphs | None = None
        self._steps_until_measured = MEASURED_STEP if record_graphs and self.device.type == "cuda" else 0

    def _slot(self, parameter: torch.nn.Parameter, seed: int) -> _Slot:
        low_precision = parameter.dtype != torch.float32
        slot = _Slot(
            parameter,
            weight_decay=self.optimizer.weight_decay if parameter.ndim >= 2 else 0.0,
            moments=new_moments(parameter, self.optimizer.moments),
            seed=seed,
            master=parameter.detach().float() if low_precision and self.optimizer.master_weights else None,
            grad=torch.zeros_like(parameter, dtype=torch.float32) if low_precision and self.accumulation > 1 else None,
        )
        parameter.gradient_sum = slot.grad  # for what can add to it in place: the LM head, the experts
        if slot.grad is not None:
            parameter.register_post_accumulate_grad_hook(lambda p: _add_and_free(slot.grad, p))
        return slot

    def train_step(self, micro_batches: Sequence[MicroBatch], lr: float) -> StepResult:
        if len(micro_batches) != self.accumulation:
            raise ValueError(f"train_step needs {self.accumulation} micro-batches, got {len(micro_batches)}")
        if self.graphs is not None:
            return self._replayed_step(micro_batches, lr)
        self._steps_until_measured -= 1
        if self._steps_until_measured == 0:
            return self._measured_step(micro_batches, lr)
        return self._eager_step(micro_batches, lr)

    def _measured_step(self, micro_batches: Sequence[MicroBatch], lr: float) -> StepResult:
        """An eager step that finds out whether the GPU waits for the host; waits for the GPU once."""
        torch.cuda.synchronize(self.device)
        started = time.perf_counter()
        result = self._eager_step(micro_batches, lr)
        host = time.perf_counter() - started
        torch.cuda.synchronize(self.device)
        if host > HOST_BOUND * (time.perf_counter() - started):
            self.graphs = StepGraphs(self)
        return result

    def _replayed_step(self, micro_batches: Sequence[MicroBatch], lr: float) -> StepResult:
        updates = self.updates
        try:
            return self.graphs.train_step(micro_batches, lr)
        except RuntimeError as failure:  # nothing was updated: recording computes nothing
            warnings.warn(f"training goes on without CUDA graphs: {failure}", stacklevel=2)
            self.graphs.release()
            self.graphs, self.updates = None, updates
            return self._eager_step(micro_batches, lr)

    def _eager_step(self, micro_batches: Sequence[MicroBatch], lr: float) -> StepResult:
        sums = StepSums(self.model, self.accumulation, self.device)
        for batch in micro_batches:
            with stage("forward"):
                share = sums.forward(batch)
            with stage("backward"):
                share.backward()
        with stage("gradient norm"):
            grad_norm = self.grad_norm()
        with stage("optimizer"):
            self.updates += 1
            self.update(lr, grad_norm)
        for slot in self.slots.values():
            slot.parameter.grad = None
            if slot.grad is not None:
                slot.grad.zero_()
        return sums.result(grad_norm)

    @torch.no_grad()
    def grad_norm(self) -> torch.Tensor:
        """The global 2-norm of the gradients, on the device."""
        gradients = [slot.gradient() for slot in self.slots.values() if slot.gradient() is not None]
        norms = [torch.linalg.vector_norm(each, dtype=torch.float32) for each in gradients if each.numel() >= LARGE]
        small = [each for each in gradients if each.numel() < LARGE]
        norms += torch._foreach_norm(small, 2, dtype=torch.float32) if small else []
        return torch.stack(norms).norm()

    @torch.no_grad()
    def update(self, lr: float, grad_norm: torch.Tensor, scalars: dict[float, torch.Tensor] | None = None) -> None:
        """AdamW on every parameter that has a gradient.

        scalars: for each weight decay, what takes the place of learning rate and step (`kernels.adamw`).
        """
        limit = self.optimizer.max_grad_norm
        scale = torch.clamp(limit / (grad_norm + 1e-6), max=1.0) if limit else torch.ones_like(grad_norm)
        # decided on the device: adamw leaves everything as it is where the scale is NaN
        scale = torch.where(torch.isfinite(grad_norm), scale, torch.nan)
        for slot in self.slots.values():
            if slot.gradient() is None:
                continue
            adamw(
                slot.parameter,
                slot.gradient(),
                **slot.moments,
                master=slot.master,
                step=self.updates,
                lr=lr,
                beta1=self.optimizer.beta1,
                beta2=self.optimizer.beta2,
                eps=self.optimizer.eps,
                weight_decay=slot.weight_decay,
                grad_scale=scale,
                scalars=None if scalars is None else scalars[slot.weight_decay],
                seed=slot.seed,
            )

    def evaluate(self, batches: Iterable[MicroBatch]) -> float:
        total, labels = evaluation_sums(self.model, list(batches), self.device).tolist()
        return total / labels if labels else float("nan")

    def saving(self) -> Saving:
        found = numbers(self._dtype(), self.updates, {"engine": "local", "world_size": 1})
        return Saving(self.rank, self._pieces, partial(self._pieces, decoded=False), found)

    def save(self, folder: Path) -> None:
        self.saving().write(Path(folder))

    def load(self, folder: Path) -> None:
        folder = Path(folder)
        updates = read_state(folder, self._dtype())
        sizes = {name: slot.parameter.numel() for name, slot in self.slots.items()}
        read_pieces(folder, self._pieces(loading=True), sizes)
        with torch.no_grad():
            for slot in self.slots.values():
                if slot.master is not None:
                    slot.parameter.copy_(slot.master)
        self.updates = updates

    def export(self, folder: Path) -> None:
        parts = ((name, 0, parameter.detach()) for name, parameter in self.model.named_parameters())
        write_model(self.model, parts, Path(folder))

    def _dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    def _pieces(self, loading: bool = False, decoded: bool = True) -> Iterator[Piece]:
        """What this process has, one parameter at a time.

        loading: take up what was written to a piece, at the next. decoded: see `readable`.
        """
        for name, slot in self.slots.items():
            weight = slot.parameter.detach() if slot.master is None else slot.master
            moments = readable(slot.moments, decoded)
            yield Piece(name, 0, {kind: tensor.view(-1) for kind, tensor in ({WEIGHT: weight} | moments).items()})
            if loading:
                take_up(slot.moments, moments)


def _add_and_free(total: torch.Tensor, parameter: torch.nn.Parameter) -> None:
    total.add_(parameter.grad)
    parameter.grad = None
