"""The processes that the tests of the engines share: launched once, whichever worker of pytest comes first."""

import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from distributed import worker
from distributed.tiny import global_step, tiny_model
from tilestack.distributed import DistributedConfig, make_engine

ROOT = Path(__file__).parents[2]
SETTINGS = ("0", "1", "2", "3", "1-experts-2", "2-experts-2")
ROWS = ("1-rows", "1-experts-2-rows", "2-experts-2-rows", "3-rows")
ALONE = "1"  # the setting that also runs in a single process


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")


def shared_folder(tmp_path_factory, name: str) -> Path:
    """A folder of this session, the same one in all workers of pytest-xdist."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    folder = shared / name
    folder.mkdir(exist_ok=True)
    return folder


def once(folder: Path, name: str, make: Callable[[Path], None]) -> None:
    """Under pytest-xdist the workers share what is made here: the first one makes it, the others wait for the lock."""
    with (folder / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / f"{name}.done").exists():
            make(folder)
            (folder / f"{name}.done").touch()


def launch_two(folder: Path) -> None:
    prepare(folder)
    launch(*TORCHRUN, 2, worker.__file__, folder, *SETTINGS)
    launch(*TORCHRUN, 2, worker.__file__, folder, *ROWS)
    (folder / "alone").mkdir()
    prepare(folder / "alone")
    launch(worker.__file__, folder / "alone", ALONE)


def prepare(folder: Path) -> None:
    tiny_model().save_pretrained(folder / "model")
    engine, _ = one_process(steps=3)
    (folder / "checkpoint-alone").mkdir()
    engine.save(folder / "checkpoint-alone")
    for zero in range(4):
        optimizer = {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "torch_adam": True}}
        section = {"stage": zero, "stage3_param_persistence_threshold": 0}  # so that even small weights are cut up
        settings = {"zero_optimization": section, "optimizer": optimizer, "gradient_clipping": "auto"}
        (folder / f"own-{zero}.json").write_text(json.dumps(settings))


def launch(*arguments) -> None:
    """Run Python as a user would whose environment is not activated: its bin folder is not on the PATH."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        "PATH": "/usr/local/bin:/usr/bin:/bin",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=540
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}"


def results(folder: Path, name: str, processes: int) -> list[dict]:
    return [json.loads((folder / f"{name}-rank-{rank}.json").read_text()) for rank in range(processes)]


def one_process(dtype=torch.float32, steps=worker.STEPS, **options):
    distributed = DistributedConfig(engine="local")
    engine = make_engine(tiny_model(dtype), worker.OPTIMIZER, distributed, worker.MICRO_BATCHES, **options)
    results = [engine.train_step(global_step(s, worker.MICRO_BATCHES), lr=1e-2) for s in range(steps)]
    return engine, [worker.measured(result) for result in results]
