"""The engines that train a model: one process of our own, or DeepSpeed from two processes on."""

from tilestack.distributed.checkpoint import CheckpointError, Saving
from tilestack.distributed.config import DistributedConfig, OptimizerConfig, SettingsError
from tilestack.distributed.engine import Engine, StepResult
from tilestack.distributed.launch import make_engine, start
from tilestack.distributed.watch import Watch, watch_ranks, watched
from tilestack.distributed.world import LaunchError, World

__all__ = [
    "CheckpointError",
    "DistributedConfig",
    "Engine",
    "LaunchError",
    "OptimizerConfig",
    "Saving",
    "SettingsError",
    "StepResult",
    "Watch",
    "World",
    "make_engine",
    "start",
    "watch_ranks",
    "watched",
]
