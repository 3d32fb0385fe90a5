"""The two calls that start a training: join the processes, and make the engine."""

from __future__ import annotations

import importlib.util

import torch

from tilestack.distributed.config import DistributedConfig, OptimizerConfig
from tilestack.distributed.engine import Engine
from tilestack.distributed.local import LocalEngine
from tilestack.distributed.world import LaunchError, World, current_world, take_up_slurm
from tilestack.models import Qwen3MoeForCausalLM, Recomputation, Weights, recompute_activations
from tilestack.models.weights import is_outline


def uses_deepspeed(distributed: DistributedConfig, world: World) -> bool:
    """Whether the configuration means DeepSpeed for this many processes."""
    return distributed.uses_deepspeed(world.world_size)


def start(distributed: DistributedConfig) -> World:
    """Check that the machine has what the engine needs, and join the other processes; before any model is built.

    Raises LaunchError with what to install or to change.
    """
    take_up_slurm()
    world = current_world()
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
    if uses_deepspeed(distributed, world):
        check_deepspeed()
        from tilestack.distributed.deepspeed_engine import join

        join(world, distributed.timeout)
    elif world.world_size > 1:
        raise LaunchError(
            f"distributed.engine='local' trains in one process, but {world.world_size} were started; "
            "set distributed.engine to 'auto', or start without torchrun"
        )
    return world


def make_engine(
    model: torch.nn.Module,
    optimizer: OptimizerConfig,
    distributed: DistributedConfig,
    accumulation: int,
    activation_checkpointing: Recomputation = "none",
    activation_offload: bool = False,
    weights: Weights | None = None,
) -> Engine:
    """The engine that trains `model`: our own for one process, DeepSpeed from two on (or when asked for by name).

    model: a tilestack.Qwen3MoeForCausalLM (or a transformers one after tilestack.enable). Its dtype decides the
        precision: bfloat16 weights get float32 master weights and moments, float32 ones are trained as they are.
    weights: with a model on the meta device (`tilestack.models.pretrained`, `drawn`): what it is filled with. Each rank
        then reads what it keeps, straight to its device, and no rank ever has the whole model that need not.
    accumulation: micro-batches per step and rank.
    activation_checkpointing, activation_offload: what the layers keep for the backward pass, and whether on the host
        (tilestack.models.recompute_activations).

    Raises ValueError for an accumulation below 1, another model, weights that are neither bfloat16 nor float32, and an
    outline without weights or a whole model with them.
    """
    if not isinstance(model, Qwen3MoeForCausalLM):
        raise ValueError(
            f"model must be a tilestack.Qwen3MoeForCausalLM, got {type(model).__module__}.{type(model).__name__}; "
            "load it by that class, or call tilestack.enable(model)"
        )
    if accumulation < 1:
        raise ValueError(f"accumulation must be at least 1, got {accumulation}")
    dtypes = {parameter.dtype for parameter in model.parameters()}
    if dtypes not in ({torch.float32}, {torch.bfloat16}):
        found = ", ".join(sorted(str(dtype) for dtype in dtypes))
        raise ValueError(
            f"the model's weights must be all float32 or all bfloat16, got {found}; set `dtype` at loading"
        )
    if is_outline(model) != (weights is not None):
        raise ValueError(
            "weights belong to a model on the meta device, and it needs them: give both as tilestack.models.pretrained "
            "or drawn returns them, or a whole model alone"
        )
    recompute_activations(model, activation_checkpointing, offload=activation_offload)
    world = current_world()
    (dtype,) = dtypes
    distributed.check_optimizer(optimizer, str(dtype).removeprefix("torch."), uses_deepspeed(distributed, world))
    if uses_deepspeed(distributed, world):
        from tilestack.distributed.deepspeed_engine import DeepSpeedEngine

        return DeepSpeedEngine(model, optimizer, distributed, accumulation, world, weights)
    for name in ("expert_parallel", "sequence_parallel"):
        ranks = getattr(distributed, name)
        if ranks > 1:
            raise ValueError(
                f"distributed.{name} = {ranks} needs as many processes, with DeepSpeed, and this is one without: set "
                f"distributed.{name} to 1, or start more with torchrun"
            )
    graphs = distributed.cuda_graphs == "auto"
    return LocalEngine(model, optimizer, accumulation, world, record_graphs=graphs, weights=weights)


def check_deepspeed() -> None:
    """Raise LaunchError, with what to install, if DeepSpeed is missing."""
    if importlib.util.find_spec("deepspeed") is None:
        raise LaunchError("training in several processes needs DeepSpeed; install it: pip install 'tilestack[train]'")
