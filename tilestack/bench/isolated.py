"""Measurements in child processes: a variant that crashes, hangs or breaks the CUDA context loses its own row alone."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any, TypeVar

PATIENCE_S = 90.0  # of one job, its compiling included
FATAL_FAILURES = 2  # after so many dead processes an implementation is not tried again

J = TypeVar("J")
Work = Callable[[J], list]


def one_after_another(
    jobs: Sequence[J], work: Work, patience_s: float = PATIENCE_S, fatal_failures: int = FATAL_FAILURES
) -> Iterator[tuple[J, list | str]]:
    """Run `work(job)` for every job in one child process, which is replaced when it dies or is silent for too long.

    jobs: picklable, with an `implementation`. work: a function of a module, so that a child can import it.
    fatal_failures: an implementation that ended so many processes is not tried again.

    Yields each job with its result, or with what went wrong.
    """
    left, deaths = list(jobs), {}
    while left:
        child = _Child(left, work)
        while left and child.usable:
            job = left.pop(0)
            yield job, child.next_result(patience_s)
            if not child.usable:
                deaths[job.implementation] = deaths.get(job.implementation, 0) + 1
        child.kill()
        hopeless = [job for job in left if deaths.get(job.implementation, 0) >= fatal_failures]
        left = [job for job in left if job not in hopeless]
        for job in hopeless:
            yield job, f"not tried: this implementation ended {fatal_failures} processes before"


def side_by_side(
    groups: Sequence[Sequence[J]], work: Work, patience_s: float = PATIENCE_S
) -> Iterator[tuple[J, list | str]]:
    """Run every group of jobs in a process of its own, all at the same time; one that dies loses the rest of its group.

    Yields each job with its result, or with what went wrong.
    """
    children = [_Child(jobs, work) for jobs in groups]
    for jobs, child in zip(groups, children, strict=True):
        for job in jobs:
            yield job, child.next_result(patience_s) if child.usable else "its process ended before"
        child.kill()


class _Child:
    def __init__(self, jobs: Sequence[J], work: Work):
        context = multiprocessing.get_context("spawn")
        self._receiver, sender = context.Pipe(duplex=False)
        self._process = context.Process(target=_run, args=(list(jobs), work, sender), daemon=True)
        self._process.start()
        sender.close()
        self.usable = True

    def next_result(self, patience_s: float) -> list | str:
        """The result of the next job, or what went wrong; afterwards `usable` says whether more may follow."""
        try:
            if not self._receiver.poll(patience_s):
                self.usable = False
                return f"no answer within {patience_s:.0f} s"
            result, self.usable = self._receiver.recv()
            return result
        except EOFError:
            self.usable = False
            self._process.join(5)
            return f"the process ended with exit code {self._process.exitcode}"

    def kill(self) -> None:
        self._process.kill()
        self._process.join()
        self._receiver.close()


def _run(jobs: list, work: Work, sender: Connection) -> None:
    for job in jobs:
        try:
            result: Any = work(job)
        except Exception as failure:  # whatever a rival raises is its row
            result = f"{type(failure).__name__}: {failure}"[:300]
        usable = _device_answers()
        sender.send((result, usable))
        if not usable:
            return


def _device_answers() -> bool:
    """False after an error that the CUDA context keeps, such as an illegal address."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return True
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True
