"""Saving while the training goes on: a copy in host memory, and a thread that writes it.

    step n           every rank copies what it holds                    (the only wait of the training)
    then, in a thread of each rank: write, bring to the disk, agree that all could; rank 0 gives the folder its name

The next save, and the end of the run, wait for the thread. Where the host has no room for the copies, all is written
before the training goes on. What fails in the thread is raised at the next step. The threads of the ranks talk over a
process group of their own, so that they never meet the training's collectives.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import tilestack
from tilestack.app import checkpoints
from tilestack.app.config import Config
from tilestack.app.data.packing import Position
from tilestack.app.errors import StoppedError, UserError
from tilestack.app.files import write_text
from tilestack.app.parse import to_plain
from tilestack.app.processes import any_rank, wait_for_all
from tilestack.distributed import Engine, Saving
from tilestack.models.files import sync_file

ROOM = 0.6  # of the host's free memory that the copies of all its ranks may take
PATIENCE_S = 60.0  # after a failure, where other ranks may be waiting to be told that they must end


class Saver:
    """Saves a run's checkpoints. Every rank has one and calls it at the same steps.

    folder: of the run's checkpoints. data: what identifies the data, compared on resume.

    As a context: leaving it waits for the checkpoint that is being written, whatever else broke; after a failure with
    several ranks not for ever. Ctrl-C while it waits ends that too.
    """

    def __init__(self, folder: Path, engine: Engine, config: Config, data: dict[str, Any]):
        self.folder, self.engine, self.config, self.data = folder, engine, config, data
        self._thread: threading.Thread | None = None
        # waited for instead of the thread: in Python 3.11, after Ctrl-C has ended a join, no join waits again
        self._ended = threading.Event()
        self._failure: UserError | None = None
        self._group = None
        if torch.distributed.is_initialized():
            self._group = torch.distributed.new_group(backend="gloo")

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None or issubclass(kind, StoppedError):  # all ranks come here, and promise that it is saved
            self.wait()
            return
        # the copy is whole, whatever broke since; but another rank may be gone, and the others wait for this one
        if not self._join(None if self.engine.world_size == 1 else PATIENCE_S):
            print(f"warning: a checkpoint was not written within {PATIENCE_S:g} s", file=sys.stderr, flush=True)
        if self._failure is not None:  # what broke first is raised, this is said
            print(f"warning: {self._failure}", file=sys.stderr, flush=True)

    def save(self, step: int, position: Position) -> None:
        """Save checkpoint `step`, and drop all but the newest train.keep_checkpoints.

        Raises UserError if the one before could not be written, or this one where there is no room for a copy.
        """
        self.wait()
        temporary = self.folder / f"{checkpoints.TEMPORARY}step-{step:08d}"
        if self.engine.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        wait_for_all()
        saving = self.engine.saving()
        random = checkpoints.random_states(self.engine.device)
        has_room = not any_rank(not _fits(saving.nbytes), self.engine.device)
        arguments = (step, position, temporary, saving.copied() if has_room else saving, random)
        ended = threading.Event()
        thread = threading.Thread(target=self._write, args=(*arguments, ended), name=f"save step {step}", daemon=True)
        thread.start()
        self._thread, self._ended = thread, ended
        if not has_room:
            self.wait()

    def check(self) -> None:
        """Raise UserError if a checkpoint could not be written; waits for nothing."""
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def wait(self) -> None:
        """Return when the checkpoint that is being written has its name. Raises UserError if it could not be."""
        self._join(None)
        self.check()

    def _join(self, timeout: float | None) -> bool:
        """Whether nothing is being written, at the latest after `timeout` seconds."""
        if self._thread is not None and self._ended.wait(timeout):
            self._thread.join()  # for it to free its copy
            self._thread = None
        return self._thread is None

    def _write(
        self, step: int, position: Position, temporary: Path, saving: Saving, random: dict, ended: threading.Event
    ) -> None:
        final = self.folder / f"step-{step:08d}"

        def own_part() -> None:
            saving.write(temporary)
            path = temporary / checkpoints.random_file(self.engine.rank)
            save_file(random, path)
            sync_file(path)

        def the_whole() -> None:
            if self.engine.rank == 0:
                state = self._state(step, position)
                write_text(temporary / checkpoints.STATE, json.dumps(state, indent=2) + "\n")
                checkpoints.publish(temporary, final, self.config.train.keep_checkpoints)

        try:
            for part in (own_part, the_whole):
                failure = self._tried(part)
                if failure is not None:
                    self._failure = UserError(f"the checkpoint {final} could not be written: {failure}")
                    return
        finally:
            ended.set()

    def _tried(self, write: Callable[[], None]) -> str | None:
        """Do something; why it failed, here or on another rank, None if it did on none."""
        failure = None
        try:
            write()
        except Exception as error:  # whatever it is, the other ranks must not wait for this one
            failure = f"{type(error).__name__}: {error}"
        try:
            failed = torch.tensor(int(failure is not None))
            if self._group is not None:
                torch.distributed.all_reduce(failed, group=self._group)
        except RuntimeError as error:
            return failure or f"another process has gone: {error}"
        return failure or (f"{int(failed)} other processes could not write their part" if failed else None)

    def _state(self, step: int, position: Position) -> dict[str, Any]:
        return {
            "step": step,
            "position": asdict(position),
            "data": self.data,
            "world_size": self.engine.world_size,
            "config": to_plain(self.config),
            "tilestack": tilestack.__version__,
            "torch": torch.__version__,
        }


def _fits(nbytes: int) -> bool:
    """Whether the host has room for such a copy of each of its ranks."""
    return nbytes * int(os.environ.get("LOCAL_WORLD_SIZE", 1)) < ROOM * free_memory()


def free_memory(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes of the host's memory that are to be had, of what this container may use; 0 where nobody says.

    Copies of files in memory are given up when somebody needs it: they are free, as MemAvailable has it.
    """
    found = []
    meminfo, limit = proc / "meminfo", cgroup / "memory.max"
    if meminfo.exists():
        fields = dict(line.split(":") for line in meminfo.read_text().splitlines())
        found.append(int(fields["MemAvailable"].split()[0]) << 10)
    if limit.exists() and limit.read_text().strip() != "max":
        used, stat, files = cgroup / "memory.current", cgroup / "memory.stat", 0
        if stat.exists():
            fields = dict(line.split() for line in stat.read_text().splitlines())
            files = int(fields.get("inactive_file", 0)) + int(fields.get("active_file", 0))
        found.append(max(0, int(limit.read_text()) - max(0, int(used.read_text()) - files)))
    return min(found, default=0)
