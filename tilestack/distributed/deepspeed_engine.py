"""Several processes, or ZeRO on one: DeepSpeed. The only module that imports it."""

from __future__ import annotations

import contextlib
import io
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from pickle import UnpicklingError

import torch
import torch.distributed as dist

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # said before the import, it is not warned about

import deepspeed
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils import set_z3_leaf_modules
from deepspeed.utils.tensor_fragment import fragment_address
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

from tilestack.distributed.checkpoint import CheckpointError, read_state, write_state
from tilestack.distributed.config import DistributedConfig, OptimizerConfig
from tilestack.distributed.deepspeed_settings import construction_settings, deepspeed_settings
from tilestack.distributed.engine import MicroBatch, StepResult
from tilestack.distributed.objective import StepSums, evaluation_sums
from tilestack.distributed.world import World
from tilestack.models import ZERO3_LEAF_CLASSES, restore_rotary_frequencies

TAG = "deepspeed"


def join(world: World) -> None:
    """Join the other processes, once; a single process without torchrun makes a group of its own."""
    if dist.is_initialized():
        return
    # DeepSpeed 0.19 calls what torch 2.13 renamed, in every step
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    backend = "nccl" if world.device.type == "cuda" else "gloo"
    if world.world_size == 1:
        # DeepSpeed wants these set; the store in memory needs no port, which another program might take first
        for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_PORT": 0}.items():
            os.environ.setdefault(name, str(value))
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    with _quiet():
        deepspeed.init_distributed(dist_backend=backend, verbose=False)


def _quiet() -> contextlib.AbstractContextManager:
    """Keeps what DeepSpeed prints while it starts (not what it logs) off the terminal."""
    return contextlib.redirect_stdout(io.StringIO())


class _Zero3Construction:
    """What transformers asks while it builds a model under ZeRO-3 (its own class wants accelerate for two lines)."""

    def __init__(self, settings: dict):
        self.config = settings

    def is_zero3(self) -> bool:
        return True


@contextlib.contextmanager
def partitioned_construction(distributed: DistributedConfig, dtype: torch.dtype) -> Iterator[None]:
    """Inside, transformers cuts parameters into the ranks' parts as it makes them, if the stage is 3."""
    settings = construction_settings(distributed, dtype)
    if settings["zero_optimization"]["stage"] < 3:
        yield
        return
    asked = _Zero3Construction(settings)
    set_hf_deepspeed_config(asked)  # transformers keeps a weak reference: `asked` must live until the end
    try:
        yield
    finally:
        unset_hf_deepspeed_config()


class DeepSpeedEngine:
    """Trains a model over all processes. See `Engine` for the contract."""

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: OptimizerConfig,
        distributed: DistributedConfig,
        accumulation: int,
        world: World,
    ):
        self.rank, self.world_size, self.device = world.rank, world.world_size, world.device
        self.model = model.train()
        self.accumulation = accumulation
        dtype = next(model.parameters()).dtype
        settings = deepspeed_settings(distributed, optimizer, accumulation, dtype, world.world_size)
        self.stage = settings["zero_optimization"]["stage"]
        if self.stage == 3:
            mark_leaf_modules(model)
        groups = parameter_groups(model, optimizer.weight_decay)
        client = None if "optimizer" in settings else _adamw(groups, optimizer, self.device)
        with _quiet():
            self.engine, *_ = deepspeed.initialize(
                model=model, optimizer=client, model_parameters=groups, config=settings, dist_init_required=False
            )
        restore_rotary_frequencies(model)  # zero.Init and DeepSpeed's model.bfloat16() round them to bfloat16
        self.engine.checkpoint_engine = _WeightsOnlyCheckpoints(self.engine._config)

    def train_step(self, micro_batches: Sequence[MicroBatch], lr: float) -> StepResult:
        if len(micro_batches) != self.accumulation:
            raise ValueError(f"train_step needs {self.accumulation} micro-batches, got {len(micro_batches)}")
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        sums = StepSums(self.model, self.accumulation * self.world_size, self.device)
        grad_norm = None
        for i, batch in enumerate(micro_batches):
            share = sums.forward(batch, self.engine)
            # DeepSpeed takes the mean of the ranks' gradients; the step's gradient is their sum
            self.engine.backward(share * self.world_size, scale_wrt_gas=False)
            if i == self.accumulation - 1 and self._updates_unchecked():
                grad_norm = self._check_gradients()
            self.engine.step()
        dist.all_reduce(sums.sums)
        if grad_norm is None:
            grad_norm = self.engine.get_global_grad_norm()
        return sums.result(torch.as_tensor(grad_norm, dtype=torch.float32, device=self.device))

    def _updates_unchecked(self) -> bool:
        """Without ZeRO, float32 weights are updated by the bare optimizer, which looks at no norm."""
        return self.stage == 0 and self.engine.optimizer is self.engine.basic_optimizer

    @torch.no_grad()
    def _check_gradients(self) -> torch.Tensor:
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        grad_norm = torch.nn.utils.get_total_norm(gradients)
        if not torch.isfinite(grad_norm):  # on every rank: all have the same gradients
            torch._foreach_zero_(gradients)
            for group in self.engine.optimizer.param_groups:
                group["lr"] = 0.0  # of this step alone: neither the decay nor the old moments move a weight
        return grad_norm

    def evaluate(self, batches: Iterable[MicroBatch]) -> float:
        batches = list(batches)
        self._check_equal_counts(len(batches))
        sums = evaluation_sums(self.model, batches, self.device)
        dist.all_reduce(sums)
        total, labels = sums.tolist()
        return total / labels if labels else float("nan")

    def _check_equal_counts(self, count: int) -> None:
        counts = torch.tensor([count, -count], device=self.device)
        dist.all_reduce(counts, op=dist.ReduceOp.MAX)
        most, least = counts[0].item(), -counts[1].item()
        if most != least:
            raise ValueError(f"evaluate needs as many batches on every rank, got between {least} and {most}")

    def save(self, folder: Path) -> None:
        folder = Path(folder)
        self.engine.save_checkpoint(str(folder), tag=TAG, save_latest=False)
        if self.rank == 0:
            write_state(folder, self._identity())
        dist.barrier()

    def load(self, folder: Path) -> None:
        folder = Path(folder)
        read_state(folder, expected=self._identity())
        try:
            path, _ = self.engine.load_checkpoint(str(folder), tag=TAG, load_lr_scheduler_states=False)
        except (OSError, RuntimeError, EOFError, KeyError, AssertionError, UnpicklingError) as error:
            raise CheckpointError(f"{folder}: DeepSpeed cannot load its files: {error}") from error
        if path is None:
            raise CheckpointError(f"{folder} holds no DeepSpeed checkpoint ({TAG}/)")

    def export(self, folder: Path) -> None:
        weights = whole_weights(self.model, keep=self.rank == 0)
        if self.rank == 0:
            self.model.save_pretrained(folder, state_dict=weights)
        dist.barrier()

    def _identity(self) -> dict:
        return {"engine": "deepspeed", "world_size": self.world_size, "zero": self.stage}


class _WeightsOnlyCheckpoints(TorchCheckpointEngine):
    """DeepSpeed's files, read without running what a pickle might hold: tensors and its own records of numbers."""

    def load(self, path: str, map_location=None):
        with torch.serialization.safe_globals([ZeroStageEnum, fragment_address, LossScaler]):
            return torch.load(path, map_location=map_location, weights_only=True)


def whole_weights(model: torch.nn.Module, keep: bool) -> dict[str, torch.Tensor]:
    """A copy of every parameter by name, on the CPU; every rank calls it, and those without `keep` get none."""
    weights = {}
    for name, parameter in model.named_parameters():
        cut_up = hasattr(parameter, "ds_id")
        with deepspeed.zero.GatheredParameters([parameter]) if cut_up else contextlib.nullcontext():
            if keep:
                weights[name] = parameter.detach().cpu().clone()
    return weights


def mark_leaf_modules(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Make ZeRO-3 gather each MoE block (and attention) as a whole, so that ranks which route differently gather alike.

    DeepSpeed knows transformers' own class by its path; ours has another one. Returns the modules.
    """
    return set_z3_leaf_modules(model, list(ZERO3_LEAF_CLASSES))


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict]:
    """Matrices with weight decay, the weights of norms without. Under ZeRO-3 a shape is where DeepSpeed keeps it."""
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trained if len(getattr(p, "ds_shape", p.shape)) >= 2]
    vectors = [p for p in trained if len(getattr(p, "ds_shape", p.shape)) < 2]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


def _adamw(groups: list[dict], optimizer: OptimizerConfig, device: torch.device) -> torch.optim.AdamW:
    betas = (optimizer.beta1, optimizer.beta2)
    return torch.optim.AdamW(groups, lr=optimizer.lr, betas=betas, eps=optimizer.eps, fused=device.type == "cuda")
