"""The engines that train a model: one process of our own, or DeepSpeed from two processes on."""

from tilestack.distributed.checkpoint import CheckpointError
from tilestack.distributed.config import DistributedConfig, OptimizerConfig, SettingsError
from tilestack.distributed.engine import Engine, StepResult, make_engine
from tilestack.distributed.launch import LaunchError, World, build_model, start

__all__ = [
    "CheckpointError",
    "DistributedConfig",
    "Engine",
    "LaunchError",
    "OptimizerConfig",
    "SettingsError",
    "StepResult",
    "World",
    "build_model",
    "make_engine",
    "start",
]
