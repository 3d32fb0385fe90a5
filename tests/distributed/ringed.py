"""One rank of test_watch.py, without torch so that it starts at once: watches, takes steps, and comes to harm."""

import importlib.util
import itertools
import json
import os
import signal
import sys
import time
from pathlib import Path

WATCH = Path(__file__).parents[2] / "tilestack" / "distributed" / "watch.py"


def load_watch():
    spec = importlib.util.spec_from_file_location("watch", WATCH)
    module = importlib.util.module_from_spec(spec)
    sys.modules["watch"] = module
    spec.loader.exec_module(module)
    return module


def main(folder: Path, rank: int, ranks: int, harm: str, victim: int) -> None:
    module = load_watch()
    module.CONNECT_S = 5.0
    calls = itertools.count()

    def gather(own):
        call = next(calls)
        if harm == "unreachable" and call == 0 and rank == victim:
            own = json.dumps(json.loads(own) | {"addresses": ["127.0.0.1"], "port": 1})
        (folder / f"tmp-{rank}").write_text(own)
        (folder / f"tmp-{rank}").rename(folder / f"words-{call}-{rank}")
        paths = [folder / f"words-{call}-{each}" for each in range(ranks)]
        while not all(path.exists() for path in paths):
            time.sleep(0.005)
        return [path.read_text() for path in paths]

    if harm == "hang in gloo":
        import torch.distributed

        store = torch.distributed.FileStore(str(folder / "store"), ranks)
        torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    watch = module.Watch(rank, ranks, gather, timeout=1.0 if harm.startswith("hang") else 30.0)
    watch.hint, watch.folder = "Resume.", folder
    with module.watched(watch, agreed=(StopIteration,)):
        for step in range(3):
            watch.at(f"step {step}, data at document {10 * step}")
            time.sleep(0.05)
            if step == 2 and harm == "agree to stop":
                if rank == victim:  # as a tracker may, while it uploads what it has
                    time.sleep(5)
                raise StopIteration
            if step == 2 and harm not in ("none", "unreachable"):
                if rank != victim:
                    wait_in_a_collective()
                come_to(harm)


def wait_in_a_collective() -> None:
    if "torch" in sys.modules:
        import torch

        torch.distributed.all_reduce(torch.ones(1))
    time.sleep(60)


def come_to(harm: str) -> None:
    if harm == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if harm == "raise":
        raise ValueError("no more data")
    time.sleep(60)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], int(sys.argv[5]))
