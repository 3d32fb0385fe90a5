"""How soon a job ends when one of its ranks dies or hangs in the middle of a step, and what it says."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

from tilestack.bench.results import Row

HARMS = ("killed", "hangs")
TIMEOUT_S = 5.0  # distributed.timeout of these jobs
LIMIT_S = 90.0
STEP = 5


Harms = dict[str, list[subprocess.Popen]]


def start_failures(gpus: int, ports: Iterator[int]) -> Harms:
    """The processes of one job for each harm, which wait for `time_failures` when they have started."""
    return {harm: _start(gpus, harm, next(ports)) for harm in HARMS}


def time_failures(gpus: int, harms: Harms) -> list[Row]:
    """Rows of op "failure": ms_median from the moment of the harm until no process is left; error: a failed check.

    The last rank takes harm between two collectives of a step. The job must end by itself, and its message must name
    the rank that was killed, or where each rank was. Both jobs run at once: they use next to nothing.
    """
    for processes in harms.values():
        for process in processes:
            process.stdin.write("go\n")
            process.stdin.flush()
    return [_row(gpus, harm, processes) for harm, processes in harms.items()]


def _start(gpus: int, harm: str, port: int) -> list[subprocess.Popen]:
    shared = {"WORLD_SIZE": str(gpus), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        subprocess.Popen(
            [sys.executable, "-m", "tilestack.bench.failures", harm],
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(gpus)
    ]


def _row(gpus: int, harm: str, processes: list[subprocess.Popen]) -> Row:
    deadline, said = time.monotonic() + LIMIT_S, []
    for process in processes:
        try:
            said.append(process.communicate(timeout=max(0.1, deadline - time.monotonic()))[1])
        except subprocess.TimeoutExpired:
            process.kill()
            said.append(process.communicate()[1] + "\nstill there")
    ended, text = time.time(), "\n".join(said)
    began = re.search(r"harm at ([\d.]+)", text)
    wanted = f"rank {gpus - 1} (host" if harm == "killed" else f"has been in step {STEP}"
    messages = [line for line in text.splitlines() if line.startswith("error: ")]
    passed = began and "still there" not in text and any(wanted in line for line in messages)
    print("\n".join(messages) if passed else text[-3000:], flush=True)
    case = {"harm": harm, "gpus": gpus, "timeout_s": TIMEOUT_S}
    took = (ended - float(began[1])) * 1e3 if began else None
    return Row("failure", case, "tilestack", "step", ms_median=took, error=None if passed else "see the log")


def harmed(harm: str) -> None:
    """What each rank runs: steps of two collectives, and the harm that comes to the last rank."""
    import torch
    import torch.distributed as dist

    from tilestack.distributed import DistributedConfig, deepspeed_engine, start, watch_ranks, watched  # noqa: F401

    if not sys.stdin.readline():  # the benchmark is gone
        return
    world = start(DistributedConfig(engine="deepspeed", timeout=TIMEOUT_S))
    numbers = torch.ones(1 << 20, device=world.device)
    with watched(watch_ranks(world, TIMEOUT_S)) as watch:
        for step in range(STEP + 1):
            watch.at(f"step {step}, whose data begins at document {10 * step}")
            dist.all_reduce(numbers)
            if step == STEP and world.rank == world.world_size - 1:
                print(f"harm at {time.time()}", file=sys.stderr, flush=True)
                if harm == "killed":
                    os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(LIMIT_S)
            dist.all_reduce(numbers)
            numbers.sum().item()


if __name__ == "__main__":
    harmed(sys.argv[1])
