"""Ctrl-C and SIGTERM: the step at hand is finished and saved. A second Ctrl-C stops at once."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from tilestack.app.processes import any_rank

SECOND_PRESS_SECONDS = 1.0  # torchrun hands the terminal's Ctrl-C on: the same press may arrive twice


class Stop:
    """Whether somebody asked the run to stop."""

    def __init__(self):
        self._since: float | None = None

    def receive(self, number: int, frame: object = None) -> None:
        """The signal handler."""
        now = time.monotonic()
        if self._since is None:
            self._since = now
        elif number == signal.SIGINT and now - self._since > SECOND_PRESS_SECONDS:
            raise KeyboardInterrupt

    def agreed(self, world_size: int, device: torch.device, ask: bool) -> bool:
        """True if this process was asked to stop; with several, if any was: they talk about it only where `ask`."""
        requested = self._since is not None
        if world_size == 1:
            return requested
        return ask and any_rank(requested, device)


@contextmanager
def stoppable() -> Iterator[Stop]:
    """Inside the block Ctrl-C and SIGTERM ask for a stop instead of making one."""
    stop = Stop()
    before = {number: signal.signal(number, stop.receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
