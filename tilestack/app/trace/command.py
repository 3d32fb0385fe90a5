"""The command line of `tilestack trace`."""

from __future__ import annotations

import json
import os
import shlex
import time
from pathlib import Path
from typing import Any

from tilestack.app.config import Config, check
from tilestack.app.errors import UserError
from tilestack.app.files import write_text
from tilestack.app.model import check_model
from tilestack.app.parse import take_option
from tilestack.app.start import configure
from tilestack.app.trace.page import page
from tilestack.app.trace.session import RIVAL, trace
from tilestack.app.trace.terminal import Progress, show
from tilestack.distributed import start


def main(argv: list[str]) -> int:
    """The command line; returns the exit code. Raises UserError for wrong input."""
    command = shlex.join(["tilestack", "trace", *argv])
    compare, argv = take_option(argv, "compare")
    if compare not in (None, RIVAL):
        raise UserError(f"--compare must be {RIVAL}, got {compare!r}")
    steps, argv = _count(argv, "steps", 3)
    warmup, argv = _count(argv, "warmup", 3)
    out, argv = take_option(argv, "out")
    if take_option(argv, "resume")[0] is not None:
        raise UserError("--resume: trace starts from new weights, or from those of --model.path RUN/export")
    config, _ = configure(argv, prog="tilestack trace")
    world = start(config.distributed)
    check(config, world.world_size)
    check_model(config)
    if compare and world.world_size > 1:
        raise UserError("--compare transformers runs in one process; start tilestack trace without torchrun")
    folder = _folder(config, out)
    with Progress(quiet=world.rank != 0) as progress:
        found = trace(config, world, compare, warmup, steps, progress.say)
    if world.rank == 0:
        found = {"command": command} | found
        show(found)
        for path in write(found, folder):
            print(f"{path.suffix[1:] + ':':6}{path}")
    return 0


def _count(argv: list[str], name: str, default: int) -> tuple[int, list[str]]:
    value, rest = take_option(argv, name)
    if value is None:
        return default, rest
    if not value.isdecimal() or int(value) < 1:
        raise UserError(f"--{name} must be a whole number of at least 1, got {value!r}")
    return int(value), rest


def _folder(config: Config, out: str | None) -> Path:
    """Where the files go. Raises UserError now if nothing can be written there, and not when the steps have run."""
    made = Path(config.output.folder) / f"{time.strftime('%Y%m%d-%H%M%S')}-{config.output.name}-trace"
    folder = made if out is None else Path(out)
    there = next(each for each in (folder.absolute(), *folder.absolute().parents) if each.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError(
            f"{'output.folder' if out is None else '--out'}: {folder} cannot be made: no right to write in {there}"
        )
    return folder


def without_timelines(found: dict[str, Any]) -> dict[str, Any]:
    """The figures alone, which are small."""
    return found | {"runs": [{k: v for k, v in run.items() if k != "timeline"} for run in found["runs"]]}


def write(found: dict[str, Any], folder: Path) -> list[Path]:
    """Write trace.html and trace.json (without the timelines) into `folder`; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "trace.html", page(found))
    write_text(folder / "trace.json", json.dumps(without_timelines(found), indent=1) + "\n")
    return [folder / "trace.html", folder / "trace.json"]
