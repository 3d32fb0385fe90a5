"""Where the records of a run go: metrics.jsonl, the terminal, trackers. Rank 0 writes, the others are silent."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tilestack.app.config import Config
from tilestack.app.display import Display
from tilestack.app.metrics import MetricsFile
from tilestack.app.start import Run
from tilestack.app.trackers import Tracker, open_trackers


class Log:
    """Takes records; see `opened`."""

    def __init__(self, display: Display, file: MetricsFile | None, trackers: list[Tracker]):
        self._display, self._file, self._trackers = display, file, trackers

    def write(self, records: list[dict[str, Any]]) -> None:
        """Show and keep the records of some steps."""
        if self._file is not None:
            self._file.append(records)
        for tracker in self._trackers:
            tracker.log(records)
        self._display.update(records)

    def say(self, text: str) -> None:
        """Show a line."""
        self._display.say(text)


@contextmanager
def opened(run: Run, config: Config, first: int, rank: int) -> Iterator[Log]:
    """The log of a run that begins after step `first`; lines of later steps, of a killed process, are cut."""
    display = Display(first, config.train.steps, quiet=rank != 0)
    if rank != 0:
        yield Log(display, None, [])
        return
    file = MetricsFile(run.metrics)
    file.cut(first)
    trackers = open_trackers(config, run.folder)
    try:
        with display.running():
            yield Log(display, file, trackers)
    finally:
        for tracker in trackers:
            tracker.close()
