"""Checkpoints of a run: complete or not there, whatever kills the process, and everything that a resume needs.

A checkpoint is written under a temporary name (`saving.py`). When every file is on the disk, and manifest.json with
their sizes too, the folder gets its name in one step. A folder `step-...` is therefore complete. Only safetensors and
JSON. Another number of processes, ZeRO stage or split of the experts may go on from it.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tilestack.app.config import Config
from tilestack.app.data.packing import Position
from tilestack.app.errors import UserError
from tilestack.app.files import read_json, sync_folder, write_text
from tilestack.app.parse import to_plain
from tilestack.distributed import Engine

MANIFEST = "manifest.json"
STATE = "state.json"
TEMPORARY = ".tmp-"
# what may differ on resume: it changes what is shown and kept, never what is computed
FREE_KEYS = (
    "output.*",
    "optimizer.offload",
    "distributed.engine",
    "distributed.zero",
    "distributed.expert_parallel",
    "distributed.expert_chunks",
    "distributed.sequence_parallel",
    "train.eval_every",
    "train.eval_micro_batches",
    "train.save_every",
    "train.keep_checkpoints",
    "model.activation_checkpointing",
    "model.activation_offload",
    "distributed.cuda_graphs",
    "distributed.timeout",
    "optimizer.non_finite",
)


def load(checkpoint: Path, engine: Engine, config: Config, data: dict[str, Any]) -> tuple[int, Position]:
    """Take up a checkpoint: weights, optimizer and random states. Returns its step and position in the data.

    Raises UserError if it is damaged, or if something that changes the computation is not what it was.
    """
    check_files(checkpoint)
    state = read_json(checkpoint / STATE)
    check_same_config(state["config"], to_plain(config), checkpoint)
    if state["data"] != data:
        raise UserError(f"data.source: the data is not what {checkpoint} was trained on ({state['data']}, now {data})")
    engine.load(checkpoint)
    # another number of ranks: the states of those that there were, over again
    random = random_file(engine.rank % state["world_size"])
    _restore_random_states(load_file(checkpoint / random), engine.device)
    return state["step"], Position(**state["position"])


def complete(folder: Path) -> list[Path]:
    """The complete checkpoints in a folder, oldest first."""
    return sorted(folder.glob("step-*"))


def clean(folder: Path) -> None:
    """Remove what a killed run left half-written."""
    for leftover in folder.glob(f"{TEMPORARY}*"):
        shutil.rmtree(leftover, ignore_errors=True)


def check_files(checkpoint: Path) -> None:
    """Raise UserError unless every file of the manifest is there with its size."""
    for name, size in read_json(checkpoint / MANIFEST)["bytes"].items():
        path = checkpoint / name
        if not path.is_file():
            raise UserError(f"{path} is missing: the checkpoint is damaged; remove {checkpoint} to use an older one")
        if path.stat().st_size != size:
            raise UserError(
                f"{path} is truncated or damaged: {path.stat().st_size} bytes instead of {size}; "
                f"remove {checkpoint} to use an older one"
            )


def check_same_config(saved: dict[str, dict], now: dict[str, dict], checkpoint: Path) -> None:
    """Raise UserError for the first key that differs and would change what is computed."""
    for group in now:
        if f"{group}.*" in FREE_KEYS:
            continue
        for key in sorted({*now[group], *saved.get(group, {})}):
            before, after = saved.get(group, {}).get(key), now[group].get(key)
            if before != after and f"{group}.{key}" not in FREE_KEYS:
                raise UserError(
                    f"{group}.{key} is {after!r}, but {checkpoint} was saved with {before!r}; leave it as it was, or "
                    "start a new run (from an exported model with --model.path)"
                )


def publish(temporary: Path, final: Path, keep: int) -> None:
    """Give a folder whose files are all on the disk its name, and drop all but the newest `keep` checkpoints."""
    files = sorted(path for path in temporary.rglob("*") if path.is_file())
    sizes = {str(path.relative_to(temporary)): path.stat().st_size for path in files}
    write_text(temporary / MANIFEST, json.dumps({"bytes": sizes}, indent=2) + "\n")
    for folder in [path for path in temporary.rglob("*") if path.is_dir()]:
        sync_folder(folder)
    if final.exists():  # the run was resumed from an older checkpoint by hand
        _remove(final)
    temporary.rename(final)
    sync_folder(final.parent)
    for old in complete(final.parent)[:-keep]:
        _remove(old)


def _remove(checkpoint: Path) -> None:
    """Delete a checkpoint so that a kill in the middle leaves no half of one under its name."""
    doomed = checkpoint.with_name(f"{TEMPORARY}old-{checkpoint.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    checkpoint.rename(doomed)
    shutil.rmtree(doomed)


def random_file(rank: int) -> str:
    """The file of a rank's random states."""
    return f"random-{rank:05d}.safetensors"


def random_states(device: torch.device) -> dict[str, torch.Tensor]:
    """torch's random states, as `load` restores them."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def _restore_random_states(states: dict[str, torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
