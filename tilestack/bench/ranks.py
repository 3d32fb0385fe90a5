"""Measurements on several ranks: one process a rank, replaced together when one of them fails or falls silent."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any

Work = Callable[[Any], list]
GRACE_S = 5.0  # for the other ranks, after one has failed
PORT = 29650  # of the first group; each group has its own


class Ranks:
    """Processes that run `work(job)` side by side, in the variables that torchrun would set; they start at once.

    work, prepare: functions of a module, so that a child can import them; prepare is called before the first job, to
        import what takes long while another group is measured. ports: free ones, one for each start.

    After a failure the ranks that are left may wait for ever in a collective: all are replaced when the next job comes.
    """

    def __init__(self, work: Work, ranks: int, ports: Iterator[int], prepare: Callable[[], None] | None = None):
        self.ranks, self._arguments, self._ports = ranks, (work, prepare), ports
        self._processes: list = []
        self._pipes: list[Connection] = []
        self._start()

    def run(self, job: Any, patience_s: float) -> list | str:
        """What rank 0 returns, or what went wrong on the first rank that failed. patience_s: of all ranks."""
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            with contextlib.suppress(OSError):  # its end is found below
                pipe.send(job)
        results: dict[int, list | str] = {}
        deadline = time.monotonic() + patience_s
        while len(results) < self.ranks:
            waiting = {pipe: rank for rank, pipe in enumerate(self._pipes) if rank not in results}
            ready = wait(waiting, max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for pipe in ready:
                rank = waiting[pipe]
                results[rank] = self._receive(rank)
                if isinstance(results[rank], str):
                    deadline = min(deadline, time.monotonic() + GRACE_S)
        failures = [f"rank {rank}: {each}" for rank, each in sorted(results.items()) if isinstance(each, str)]
        silent = [rank for rank in range(self.ranks) if rank not in results]
        if silent and not failures:
            failures = [f"rank {silent[0]}: no answer within {patience_s:.0f} s"]
        if failures:
            self.stop()
        return failures[0] if failures else results[0]

    def stop(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        self._processes, self._pipes = [], []

    def _start(self) -> None:
        context, port = multiprocessing.get_context("spawn"), next(self._ports)
        for rank in range(self.ranks):
            ours, theirs = context.Pipe()
            arguments = (*self._arguments, rank, self.ranks, port, theirs)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)

    def _receive(self, rank: int) -> list | str:
        try:
            return self._pipes[rank].recv()
        except (EOFError, ConnectionResetError):
            self._processes[rank].join(GRACE_S)
            return f"the process ended with exit code {self._processes[rank].exitcode}"


def free_ports() -> Iterator[int]:
    """Ports that nobody listens at, none of them twice."""
    for port in range(PORT, 65536):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                yield port


def _serve(work: Work, prepare: Callable | None, rank: int, ranks: int, port: int, pipe: Connection) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    if prepare is not None:
        prepare()
    while True:
        try:
            job = pipe.recv()
        except EOFError:  # the parent is gone
            return
        try:
            result: list | str = work(job)
        except Exception as failure:  # whatever a rival raises is its row
            traceback.print_exc()
            result = f"{type(failure).__name__}: {failure}"[:300]
        pipe.send(result)
