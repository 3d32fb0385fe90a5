"""A pytest plugin that keeps what ran, test by test, also of a run that is stopped.

    python -m pytest -p tilestack.testing.record --record FILE [--seconds N] [--only PATTERN] ...

FILE gets one line of JSON a test: {"test", "outcome", "seconds", "message"}. outcome: passed, failed, skipped, or
"not reached" for tests that N seconds after the start had not begun: those are not run. PATTERN: a regular expression
that the ids of the tests have.
"""

from __future__ import annotations

import json
import re
import time
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

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if self.path is None or (report.when != "call" and report.outcome == "passed"):
            return
        message = "" if report.outcome == "passed" else _message(report)
        line = {
            "test": report.nodeid,
            "outcome": "not reached" if OUT_OF_TIME in message else report.outcome,
            "seconds": round(report.duration, 2),
            "message": message[-LONGEST_MESSAGE:],
        }
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def _message(report: pytest.TestReport) -> str:
    return str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)
