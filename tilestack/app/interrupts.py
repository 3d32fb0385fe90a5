"""Ctrl-C and SIGTERM: the step at hand is finished and saved. A second Ctrl-C stops at once."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager


class Stop:
    """True once somebody asked the run to stop."""

    def __init__(self):
        self.requested = False

    def _request(self, number: int, frame: object) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True

    def __bool__(self) -> bool:
        return self.requested


@contextmanager
def stoppable() -> Iterator[Stop]:
    """Inside the block Ctrl-C and SIGTERM set the flag instead of stopping the program."""
    stop = Stop()
    before = {number: signal.signal(number, stop._request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
