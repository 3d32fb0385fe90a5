"""A pytest plugin that keeps what ran, test by test, also of a run that is stopped.

    python -m pytest -p tilestack.testing.record --record FILE [--seconds N] [--only PATTERN] ...

FILE gets lines of JSON, {"test", "outcome", "seconds", "message"}, of which the last of a test is its outcome: passed,
failed, skipped, or "not reached" for tests that N seconds after the start had not begun: those are not run. All tests
are entered as not reached before the first begins, so that the record of a run that is stopped is complete. PATTERN: a
regular expression that the ids of the tests have.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable
from pathlib import Path

import pytest

OUT_OF_TIME = "not begun before the time limit"
LONGEST_MESSAGE = 1500


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("record")
    group.addoption("--record", type=Path, help="file that gets one line of JSON a test")
    group.addoption("--seconds", type=float, help="tests that have not begun by then are not run")
    group.addoption("--only", default="", help="a regular expression: tests whose ids have it")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(_Record(config))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items[:] = [each for each in items if re.search(config.option.only, each.nodeid)]


class _Record:
    def __init__(self, config: pytest.Config):
        self.started, self.seconds = time.monotonic(), config.option.seconds
        # under xdist the process that collects every worker's reports writes
        self.path = None if hasattr(config, "workerinput") else config.option.record
        if self.path:
            self.path.write_text("")

    def pytest_runtest_setup(self) -> None:
        if self.seconds is not None and time.monotonic() - self.started > self.seconds:
            pytest.skip(OUT_OF_TIME)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self._enter(each.nodeid for each in session.items)

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids: list[str]) -> None:
        self._enter(ids)

    def _enter(self, ids: Iterable[str]) -> None:
        if self.path and not self.path.stat().st_size:
            for each in ids:
                self._write(each, "not reached", 0.0, "")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if self.path and (report.when == "call" or report.outcome != "passed"):
            message = "" if report.outcome == "passed" else _message(report)
            outcome = "not reached" if OUT_OF_TIME in message else report.outcome
            self._write(report.nodeid, outcome, report.duration, message)

    def _write(self, test: str, outcome: str, seconds: float, message: str) -> None:
        line = {"test": test, "outcome": outcome, "seconds": round(seconds, 2), "message": message[-LONGEST_MESSAGE:]}
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def _message(report: pytest.TestReport) -> str:
    return str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)
