"""Processes: who this one is, what it must have before DeepSpeed starts, and how a model is built for ZeRO-3."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from tilestack.distributed.config import DistributedConfig


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


def uses_deepspeed(distributed: DistributedConfig, world: World) -> bool:
    """Whether the configuration means DeepSpeed for this many processes."""
    return distributed.engine == "deepspeed" or (distributed.engine == "auto" and world.world_size > 1)


def start(distributed: DistributedConfig) -> World:
    """Check that the machine has what the engine needs, and join the other processes; before any model is built.

    Raises LaunchError with what to install or to change.
    """
    world = current_world()
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
    if uses_deepspeed(distributed, world):
        check_deepspeed(world.device)
        from tilestack.distributed.deepspeed_engine import join

        join(world)
    elif world.world_size > 1:
        raise LaunchError(
            f"distributed.engine='local' trains in one process, but {world.world_size} were started; "
            "set distributed.engine to 'auto', or start without torchrun"
        )
    return world


@contextlib.contextmanager
def build_model(distributed: DistributedConfig, dtype: torch.dtype) -> Iterator[None]:
    """The place to call `from_pretrained` in.

    Under ZeRO-3 every parameter is cut into the ranks' parts as it is made; otherwise this changes nothing. A new
    model is built outside: a bare `Qwen3MoeForCausalLM(config)` in here would be left uninitialised by transformers.
    dtype: what the model is loaded in.
    """
    if not uses_deepspeed(distributed, current_world()):
        yield
        return
    from tilestack.distributed.deepspeed_engine import partitioned_construction

    with partitioned_construction(distributed, dtype):
        yield


def check_deepspeed(device: torch.device) -> None:
    """Check what DeepSpeed needs at its start, which would otherwise fail late and far from the cause.

    On the CPU it compiles its shared-memory collectives at its first start: a C++ compiler, ninja and Python's headers.

    Raises LaunchError that names what is missing and what to install.
    """
    if importlib.util.find_spec("deepspeed") is None:
        raise LaunchError("training in several processes needs DeepSpeed; install it: pip install 'tilestack[train]'")
    if device.type != "cpu":
        return
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        raise LaunchError(
            f"DeepSpeed compiles a small C++ extension at its first start on a CPU, and there is no C++ compiler "
            f"({compiler!r} is not on the PATH); install one (Debian, Ubuntu: apt install g++; Fedora: dnf install "
            "gcc-c++), or train in one process, which needs none"
        )
    headers = Path(sysconfig.get_path("include"))
    if not (headers / "Python.h").exists():
        raise LaunchError(
            f"DeepSpeed compiles a small C++ extension at its first start on a CPU, and Python's headers are missing "
            f"({headers}/Python.h); install them (Debian, Ubuntu: apt install python3-dev; Fedora: dnf install "
            "python3-devel), or train in one process, which needs none"
        )
    _find_ninja()


def _find_ninja() -> None:
    """Put the environment's own ninja on the PATH: it is not there where the environment was not activated."""
    if shutil.which("ninja") is not None:
        return
    scripts = sysconfig.get_path("scripts")
    if shutil.which("ninja", path=scripts) is None:
        raise LaunchError(
            "DeepSpeed compiles its extension with ninja, which is missing; install it: pip install ninja"
        )
    os.environ["PATH"] = os.pathsep.join([scripts, os.environ.get("PATH", "")])
