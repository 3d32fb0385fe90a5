"""Several processes, or ZeRO on one: DeepSpeed. What imports it is this module and what it imports."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import io
import itertools
import os
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # said before the import, it is not warned about

import deepspeed
from deepspeed.moe.utils import is_moe_param
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.sequence_parallel import parallel_state_sp
from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS
from deepspeed.utils import groups as deepspeed_groups
from deepspeed.utils import set_z3_leaf_modules

from tilestack.distributed.checkpoint import CheckpointError, Saving, numbers, read_pieces, read_state
from tilestack.distributed.config import DistributedConfig, OptimizerConfig, SettingsError
from tilestack.distributed.deepspeed_settings import check_model, check_processes, deepspeed_settings, group_sizes
from tilestack.distributed.engine import MicroBatch, StepResult
from tilestack.distributed.expert_parallel import ExpertGroup, split_experts, split_weights
from tilestack.distributed.objective import StepSums, evaluation_sums
from tilestack.distributed.optimizer import AdamW
from tilestack.distributed.sequence_parallel import Ulysses, shard_sequences
from tilestack.distributed.stages import stage
from tilestack.distributed.world import World
from tilestack.distributed.zero3_loading import materialise_parts
from tilestack.distributed.zero_pieces import OptimizerState, update_weights_in_place
from tilestack.distributed.zero_step import OnePassZeroOptimizer, bucket_elements, unit, update_in_one_pass
from tilestack.models import ZERO3_LEAF_CLASSES, Weights, materialise, restore_rotary_frequencies
from tilestack.models.export import Part, write_model

LATER_S = 30.0


def join(world: World, timeout: float) -> None:
    """Join the other processes, once; a single process without torchrun makes a group of its own.

    timeout: seconds of a collective. `Watch` ends a training after as many seconds of one step, and says more: the
        collective's own limit is a little later.
    """
    if dist.is_initialized():
        return
    # DeepSpeed 0.19 calls what torch 2.13 renamed, in every step
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    # what NCCL was asked for and has not finished: `Watch` reads it when a rank is stuck
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
    backend = "nccl" if world.device.type == "cuda" else "gloo"
    if world.world_size == 1:
        # DeepSpeed wants these set; the store in memory needs no port, which another program might take first
        for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_PORT": 0}.items():
            os.environ.setdefault(name, str(value))
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    # for inference on a CPU, and compiled on the user's machine at its first start
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    with _quiet():
        limit = datetime.timedelta(seconds=timeout + LATER_S)
        deepspeed.init_distributed(dist_backend=backend, verbose=False, timeout=limit)


def _quiet() -> contextlib.AbstractContextManager:
    """Keeps what DeepSpeed prints while it starts (not what it logs) off the terminal."""
    return contextlib.redirect_stdout(io.StringIO())


class DeepSpeedEngine:
    """Trains a model over all processes. See `Engine` for the contract."""

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: OptimizerConfig,
        distributed: DistributedConfig,
        accumulation: int,
        world: World,
        weights: Weights | None = None,
    ):
        self.rank, self.world_size, self.device = world.rank, world.world_size, world.device
        self.model = model.train()
        self.accumulation = accumulation
        dtype = next(model.parameters()).dtype
        settings = deepspeed_settings(distributed, optimizer, accumulation, dtype, world.world_size)
        self.stage = settings["zero_optimization"]["stage"]
        if self.stage == 3:
            mark_leaf_modules(model)
        check_processes(distributed, world.world_size)
        check_model(distributed, model.config)
        _check_one_number_of_ranks_a_row(distributed)
        exact = dataclasses.replace(distributed, zero=self.stage)  # a file of the user's own may name it
        exact.check_optimizer(optimizer, str(dtype).removeprefix("torch."), with_deepspeed=True)
        for parameter in model.parameters():
            parameter.__dict__.pop("gradient_sum", None)  # of a local engine that had the model before
        self.sequence = _join_sequence(distributed.sequence_parallel, world)
        if self.sequence is not None:
            shard_sequences(model, self.sequence)
        self.experts = _join_experts(distributed.expert_parallel, world)
        if self.experts is not None:
            split_experts(model, self.experts, distributed.expert_chunks)
        if weights is not None and self.stage == 3:
            materialise_parts(model, weights, settings, self.device)
        elif weights is not None:
            materialise(model, weights, self.device, self._begins())
        groups = parameter_groups(model, optimizer.weight_decay)
        if self.stage == 2 and "optimizer" not in settings and not _offloads(settings):
            groups = [part for group in groups for part in _units(model, group)]
        elif self.stage == 2:
            settings["zero_optimization"].setdefault("reduce_bucket_size", bucket_elements(model))
            groups = [part for group in groups for part in _divided(group, self._ranks_of(group))]
        client = None if "optimizer" in settings else _adamw(groups, optimizer, settings)
        with _quiet():
            split = {
                "experts_are_split": self.experts is not None,
                "sequences_are_split": self.sequence is not None,
            }
            self.engine = _initialize(model, client, groups, settings, **split)
        if self.sequence is not None and hasattr(self.engine.optimizer, "bf16_groups"):
            self.engine.optimizer.mpu = None  # it would take ranks that share rows for ranks that share weights
        if self.stage in (1, 2) and not optimizer.master_weights and dtype == torch.bfloat16:
            update_weights_in_place(self.engine.optimizer)
        update_in_one_pass(self.engine.optimizer)
        if self.stage == 0:
            self._state().restart()  # in bfloat16 DeepSpeed's wrapper has made an update of nothing
        restore_rotary_frequencies(model)  # zero.Init and DeepSpeed's model.bfloat16() round them to bfloat16

    def train_step(self, micro_batches: Sequence[MicroBatch], lr: float) -> StepResult:
        if len(micro_batches) != self.accumulation:
            raise ValueError(f"train_step needs {self.accumulation} micro-batches, got {len(micro_batches)}")
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        sums = StepSums(self.model, self.accumulation * self.world_size, self.device)
        grad_norm = None
        for i, batch in enumerate(map(self._part_of, micro_batches)):
            with stage("forward"):
                share = sums.forward(batch, self.engine)
            with stage("backward"):
                # the step's gradient is the sum of the ranks', and DeepSpeed divides it
                self.engine.backward(share * self._gradient_divisor(), scale_wrt_gas=False)
            if i == self.accumulation - 1 and self._updates_unchecked():
                with stage("gradient norm"):
                    grad_norm = self._check_gradients()
            with stage("optimizer"):
                self.engine.step()
        dist.all_reduce(sums.sums)
        if grad_norm is None:
            grad_norm = self.engine.get_global_grad_norm()
        return sums.result(torch.as_tensor(grad_norm, dtype=torch.float32, device=self.device))

    def _part_of(self, batch: MicroBatch) -> MicroBatch:
        return batch if self.sequence is None else self.sequence.share(batch)

    def _gradient_divisor(self) -> int:
        """What DeepSpeed divides the sum of all ranks' gradients by: the number of those that have different data.

        But ZeRO-3, where it scatters while it reduces (as it does unless told otherwise), divides by all ranks.
        """
        if isinstance(self.engine.optimizer, OnePassZeroOptimizer):
            return 1
        if self.sequence is None or (self.stage == 3 and self.engine.zero_reduce_scatter()):
            return self.world_size
        return self.world_size // self.sequence.ranks

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
        sums = evaluation_sums(self.model, list(map(self._part_of, batches)), self.device)
        dist.all_reduce(sums)
        total, labels = sums.tolist()
        return total / labels if labels else float("nan")

    def _check_equal_counts(self, count: int) -> None:
        counts = torch.tensor([count, -count], device=self.device)
        dist.all_reduce(counts, op=dist.ReduceOp.MAX)
        most, least = counts[0].item(), -counts[1].item()
        if most != least:
            raise ValueError(f"evaluate needs as many batches on every rank, got between {least} and {most}")

    def saving(self) -> Saving:
        state, dtype = self._state(), next(self.model.parameters()).dtype
        # without ZeRO every rank has the same
        saves = self.stage > 0 or self.rank == 0
        pieces, shapes = (state.pieces, partial(state.pieces, decoded=False)) if saves else (tuple, tuple)
        ranks = {"world_size": self.world_size, "zero": self.stage, "expert_parallel": self._expert_ranks()}
        found = numbers(dtype, state.updates, {"engine": "deepspeed"} | ranks)
        return Saving(self.rank, pieces, shapes, found if self.rank == 0 else None)

    def save(self, folder: Path) -> None:
        self.saving().write(Path(folder))
        dist.barrier()

    def load(self, folder: Path) -> None:
        folder, state, updates, failure = Path(folder), self._state(), 0, None
        try:
            updates = read_state(folder, next(self.model.parameters()).dtype)
            read_pieces(folder, state.pieces(loading=True), self._sizes())
        except CheckpointError as error:
            failure = error
        # what follows is a collective: if one rank could not read its part, no rank goes there
        failed = torch.tensor(failure is not None, dtype=torch.int32, device=self.device)
        dist.all_reduce(failed)
        if failure is not None:
            raise failure
        if failed:
            raise CheckpointError(f"{folder} could not be read by {int(failed)} other of {self.world_size} processes")
        state.publish(updates)

    def _state(self) -> OptimizerState:
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        return OptimizerState(self.engine, names, self._begins())

    def _begins(self) -> dict[str, int]:
        """Of the weights of experts, of which this rank has a part: the number of its first element in the whole."""
        split = split_weights(self.model) if self.experts is not None else {}
        return {name: self.experts.rank * parameter.numel() for name, parameter in split.items()}

    def _sizes(self) -> dict[str, int]:
        """How many elements each trained parameter has, over all ranks."""
        sizes = {n: getattr(p, "ds_numel", p.numel()) for n, p in self.model.named_parameters() if p.requires_grad}
        split = split_weights(self.model) if self.experts is not None else {}
        return sizes | {name: sizes[name] * self._expert_ranks() for name in split if name in sizes}

    def _ranks_of(self, group: dict) -> int:
        """How many ranks have the same weights of a group, and share its update."""
        return self.world_size // self._expert_ranks() if group.get("moe") else self.world_size

    def _expert_ranks(self) -> int:
        return 1 if self.experts is None else self.experts.size

    def export(self, folder: Path) -> None:
        parts = whole_weights(self.model, keep=self.rank == 0, experts=self.experts)
        if self.rank == 0:
            write_model(self.model, parts, Path(folder))
        else:
            for _ in parts:
                pass
        dist.barrier()


def _check_one_number_of_ranks_a_row(distributed: DistributedConfig) -> None:
    """Raise SettingsError if this process has trained with rows split otherwise: DeepSpeed keeps the first split."""
    ranks = distributed.sequence_parallel
    had = ranks
    if parallel_state_sp._SEQUENCE_PARALLEL_GROUP is not None:
        had = parallel_state_sp.get_sequence_parallel_world_size()
    if ranks != had:
        raise SettingsError(
            f"distributed.sequence_parallel = {ranks}: DeepSpeed takes one number a process, and this one has had {had}"
        )


def _join_sequence(ranks: int, world: World) -> Ulysses | None:
    """The ranks that share this rank's rows; None if it has whole ones."""
    if ranks == 1:
        return None
    if parallel_state_sp._SEQUENCE_PARALLEL_GROUP is None:
        parallel_state_sp.initialize_sequence_parallel(ranks)
    return Ulysses(parallel_state_sp.get_sequence_parallel_group(), world.rank % ranks, ranks)


def _join_experts(size: int, world: World) -> ExpertGroup | None:
    """The ranks that share this rank's experts; None if every rank has all of them."""
    if size == 1:
        return None
    name = f"ep_size_{size}"
    deepspeed_groups._create_expert_and_data_parallel(size)
    return ExpertGroup(deepspeed_groups._get_expert_parallel_group(name), world.rank % size, size, name)


def _initialize(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer | None,
    groups: list[dict],
    settings: dict,
    experts_are_split: bool,
    sequences_are_split: bool,
) -> deepspeed.DeepSpeedEngine:
    mpu = parallel_state_sp if sequences_are_split else None  # how DeepSpeed learns of the ranks that share rows
    arguments = {"model": model, "optimizer": optimizer, "model_parameters": groups, "mpu": mpu}
    arguments["dist_init_required"] = False
    if not experts_are_split:
        return deepspeed.initialize(config=settings, **arguments)[0]
    return _ExpertEngine(args=None, config=settings, config_class=DeepSpeedConfig(settings, mpu), **arguments)


class _ExpertEngine(deepspeed.DeepSpeedEngine):
    """DeepSpeed reduces the gradients of experts among the ranks that hold the same ones, if it knows of MoE layers.

    It looks for layers of its own classes; ours it knows by their parameters alone, as `split_experts` marks them.
    `deepspeed.initialize` cannot be told to use another class.
    """

    def _configure_distributed_model(self, model: torch.nn.Module) -> None:
        super()._configure_distributed_model(model)
        self.has_moe_layers = True


def whole_weights(model: torch.nn.Module, keep: bool, experts: ExpertGroup | None = None) -> Iterator[Part]:
    """The parts of every parameter in order, on the device; every rank iterates, and those without `keep` get none.

    One parameter after the other is whole on the device; of the experts, where they are split, not even that: each
    rank of the group sends its part in turn. A part is there until the next is asked for.
    """
    split = split_weights(model) if experts is not None else {}
    for name, parameter in model.named_parameters():
        cut_up = hasattr(parameter, "ds_id")
        with deepspeed.zero.GatheredParameters([parameter]) if cut_up else contextlib.nullcontext():
            parts = _parts_of_experts(parameter, experts) if name in split else [parameter.detach()]
            first = 0
            for part in parts:
                if keep:
                    yield name, first, part
                first += part.shape[0]


def _parts_of_experts(parameter: torch.nn.Parameter, experts: ExpertGroup) -> Iterator[torch.Tensor]:
    """The parts of all ranks of the group in order, one at a time; each rank of the group iterates."""
    for rank in range(experts.size):
        part = parameter.detach().clone() if rank == experts.rank else torch.empty_like(parameter)
        dist.broadcast(part, dist.get_global_rank(experts.group, rank), group=experts.group)
        yield part


def mark_leaf_modules(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Make ZeRO-3 gather each MoE block (and attention) as a whole, so that ranks which route differently gather alike.

    DeepSpeed knows transformers' own class by its path; ours has another one. Returns the modules.
    """
    return set_z3_leaf_modules(model, list(ZERO3_LEAF_CLASSES))


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict]:
    """Matrices with weight decay, the weights of norms without; a part of the experts is a group of its own.

    Under ZeRO-3 a shape is where DeepSpeed keeps it.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trained if len(getattr(p, "ds_shape", p.shape)) >= 2]
    vectors = [p for p in trained if len(getattr(p, "ds_shape", p.shape)) < 2]
    own = [p for p in matrices if is_moe_param(p)]
    matrices = [p for p in matrices if not is_moe_param(p)]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    if own:
        groups.append({"params": own, "weight_decay": weight_decay, "moe": True, "name": own[0].group_name})
    return groups


def _divided(group: dict, ranks: int) -> Iterator[dict]:
    """The group in smaller ones, for DeepSpeed's ZeRO-2: of one shape each (see `group_sizes`), and one of the rest."""
    shapes = defaultdict(list)
    for parameter in group["params"]:
        shapes[parameter.shape].append(parameter)
    left = []
    for alike in shapes.values():
        rest = iter(alike)
        for size in group_sizes(len(alike), alike[0].numel(), ranks):
            yield group | {"params": list(itertools.islice(rest, size))}
        left += rest
    if left:
        yield group | {"params": left}


def _units(model: torch.nn.Module, group: dict) -> Iterator[dict]:
    """The group in smaller ones, for our own ZeRO-2: see `unit`. Vectors, which are small, stay together."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    units = defaultdict(list)
    for parameter in group["params"]:
        units[unit(names[id(parameter)], parameter) if parameter.dim() > 1 else "vectors"].append(parameter)
    for parameters in units.values():
        yield group | {"params": parameters}


def _offloads(settings: dict) -> bool:
    return settings["zero_optimization"].get("offload_optimizer", {}).get("device", "none") != "none"


def _adamw(groups: list[dict], optimizer: OptimizerConfig, settings: dict) -> torch.optim.Optimizer:
    if not _offloads(settings):
        if AdamW not in ZERO_SUPPORTED_OPTIMIZERS:  # or DeepSpeed warns that it was not tested
            ZERO_SUPPORTED_OPTIMIZERS.append(AdamW)
        return AdamW(groups, optimizer)
    betas = (optimizer.beta1, optimizer.beta2)
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=optimizer.eps, fused=True)
