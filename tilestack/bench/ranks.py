"""Measurements on several ranks: one process a rank, replaced together when one of them fails or falls silent."""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import TypeVar

J = TypeVar("J")
Work = Callable[[J], list]
GRACE_S = 5.0  # for the other ranks, after one has failed


def on_ranks(jobs: Sequence[J], work: Work, ranks: int, patience_s: float) -> Iterator[tuple[J, list | str]]:
    """Run `work(job)` on every rank for every job, in the variables that torchrun would set.

    jobs: picklable. work: a function of a module, so that a child can import it. patience_s: of one job, on all ranks.

    Yields each job with what rank 0 returned, or with what went wrong on the first rank that failed. After a failure
    the other ranks may wait for ever in a collective: all processes are replaced.
    """
    left = list(jobs)
    while left:
        group = _Group(left, work, ranks)
        try:
            while left and group.usable:
                job = left.pop(0)
                yield job, group.next_result(patience_s)
        finally:
            group.kill()


class _Group:
    def __init__(self, jobs: Sequence[J], work: Work, ranks: int):
        context = multiprocessing.get_context("spawn")
        port = free_port()
        self._processes, self._receivers = [], []
        for rank in range(ranks):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_serve, args=(list(jobs), work, rank, ranks, port, sender), daemon=True)
            process.start()
            sender.close()
            self._processes.append(process)
            self._receivers.append(receiver)
        self.usable = True

    def next_result(self, patience_s: float) -> list | str:
        """The result of the next job; afterwards `usable` says whether more may follow."""
        results: dict[int, list | str] = {}
        deadline = time.monotonic() + patience_s
        while len(results) < len(self._receivers):
            waiting = {r: rank for rank, r in enumerate(self._receivers) if rank not in results}
            ready = wait(waiting, max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for receiver in ready:
                rank = waiting[receiver]
                results[rank] = self._receive(rank)
                if isinstance(results[rank], str):
                    deadline = min(deadline, time.monotonic() + GRACE_S)
        failures = [f"rank {rank}: {each}" for rank, each in sorted(results.items()) if isinstance(each, str)]
        silent = [rank for rank in range(len(self._receivers)) if rank not in results]
        if silent and not failures:
            failures = [f"rank {silent[0]}: no answer within {patience_s:.0f} s"]
        self.usable = not failures
        return failures[0] if failures else results[0]

    def _receive(self, rank: int) -> list | str:
        try:
            return self._receivers[rank].recv()
        except EOFError:
            self._processes[rank].join(GRACE_S)
            return f"the process ended with exit code {self._processes[rank].exitcode}"

    def kill(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()


def free_port() -> int:
    """A port that nobody listened at a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _serve(jobs: list, work: Work, rank: int, ranks: int, port: int, sender: Connection) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    for job in jobs:
        try:
            result: list | str = work(job)
        except Exception as failure:  # whatever a rival raises is its row
            traceback.print_exc()
            result = f"{type(failure).__name__}: {failure}"[:300]
        sender.send(result)
        if isinstance(result, str):
            return
