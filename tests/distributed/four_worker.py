"""What torchrun starts for test_four_processes.py: loads a model in parts, and checkpoints of two processes on four.

usage: four_worker.py FOLDER, where test_deepspeed_engine.py has left its model and checkpoints, and a larger model in
FOLDER/large. Rank r writes FOLDER/four-rank-<r>.json.
"""

import json
import os
import sys
import threading
from pathlib import Path

import torch

from distributed import worker
from distributed.tiny import global_step
from tilestack.distributed import CheckpointError, checkpoint, deepspeed_engine, make_engine, start
from tilestack.models import pretrained

PARTS = ("3", "2-experts-4")
FROM_TWO = {"3": "2", "2-experts-2": "2-experts-4", "1": "3"}  # what two processes saved: how four go on


class Counted:
    """A source of weights that counts what it is asked for."""

    def __init__(self, weights):
        self.weights, self.elements = weights, 0

    def fill(self, name, start, target):
        self.elements += target.numel()
        self.weights.fill(name, start, target)


class Peak:
    """The most memory of its own (no mapped files) that this process has inside the block, above that at its begin."""

    def __enter__(self):
        self.begin = self.peak = own_memory()
        self.done = threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self):
        while not self.done.wait(0.0005):
            self.peak = max(self.peak, own_memory())

    def __exit__(self, *_):
        self.peak = max(self.peak, own_memory())
        self.done.set()
        self.thread.join()

    @property
    def bytes(self) -> int:
        return self.peak - self.begin


def own_memory() -> int:
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")]
    return int(line.split()[1]) << 10


def load_in_parts(folder: Path, setting: str) -> dict:
    """Make an engine over the larger model; what loading asked the source for, and the memory that it took."""
    model, weights = pretrained(folder / "large", torch.float32)
    counted, peaks = Counted(weights), []

    def watched(function):
        def run(*arguments):
            with Peak() as peak:
                function(*arguments)
            peaks.append(peak.bytes)

        return run

    real = {name: getattr(deepspeed_engine, name) for name in ("materialise", "materialise_parts")}
    for name, function in real.items():
        setattr(deepspeed_engine, name, watched(function))
    make_engine(model, worker.OPTIMIZER, worker.chosen(setting), 1, weights=counted)
    for name, function in real.items():
        setattr(deepspeed_engine, name, function)
    return {"elements": counted.elements, "peak": peaks[0]}


def go_on(folder: Path, saved: str, setting: str) -> None:
    engine = worker.make(folder, worker.chosen(setting))
    engine.load(folder / f"checkpoint-{saved}")
    save(engine, folder / f"checkpoint-{saved} on four")


def train_on_four(folder: Path, setting: str) -> list[dict]:
    engine = worker.make(folder, worker.chosen(setting))
    batches = [global_step(step, worker.MICRO_BATCHES)[engine.rank :: engine.world_size] for step in range(3)]
    steps = [worker.measured(engine.train_step(each, lr=1e-2)) for each in batches]
    save(engine, folder / f"checkpoint-{setting} of four")
    export = folder / f"export-{setting} of four"
    export.mkdir(exist_ok=True)
    engine.export(export)
    return steps


def save(engine, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    engine.save(folder)


def an_unreadable_part(folder: Path) -> str:
    """What each rank says if one of them cannot read its part of a checkpoint."""
    engine = worker.make(folder, worker.chosen("2"))
    if engine.rank == 2:
        deepspeed_engine.read_pieces = broken
    try:
        engine.load(folder / "checkpoint-2")
    except CheckpointError as error:
        return str(error)
    finally:
        deepspeed_engine.read_pieces = checkpoint.read_pieces
    return "no error"


def broken(folder: Path, *_) -> None:
    raise CheckpointError(f"{folder}/pieces-00001-0000.safetensors is damaged")


def main() -> None:
    folder = Path(sys.argv[1])
    start(worker.chosen("2"))
    found = {"parts": {setting: load_in_parts(folder, setting) for setting in PARTS}}
    for saved, setting in FROM_TWO.items():
        go_on(folder, saved, setting)
    found["steps"] = {setting: train_on_four(folder, setting) for setting in PARTS}
    found["unreadable"] = an_unreadable_part(folder)
    (folder / f"four-rank-{os.environ['RANK']}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
