"""The installed command `tilestack`: one word more than train.py.

What a command needs is imported when it runs: torch and transformers take seconds, and help needs neither.
"""

from __future__ import annotations

import difflib
import importlib
import runpy
import sys
from collections.abc import Callable

from tilestack.app import usage
from tilestack.app.errors import UserError, reported

MODULES = {
    "explain": "tilestack.app.explain",
    "plan": "tilestack.app.plan.command",
    "trace": "tilestack.app.trace.command",
    "doctor": "tilestack.app.doctor",
    "report": "tilestack.app.report",
    "bench": "tilestack.bench.cli",
}
HELP = ("-h", "--help")


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    words = sys.argv[1:] if argv is None else argv
    with reported():
        if not words or words[0] in HELP:
            print(usage.TILESTACK)
            return 0
        command, options = words[0], words[1:]
        if command not in ("train", *MODULES):
            close = difflib.get_close_matches(command, ["train", *MODULES], n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise UserError(f"unknown command {command!r}{hint}\n{usage.TILESTACK}")
        if command in usage.COMMANDS and (set(HELP) & set(options) or command == "report" and not options):
            print(usage.COMMANDS[command])
            return 0
        return _loaded(command)(options) or 0


def _loaded(command: str) -> Callable[[list[str]], int | None]:
    """The function that runs a command. Raises UserError if a package that it needs is missing, or a wrong version."""
    try:
        if command != "train":
            return importlib.import_module(MODULES[command]).main
        from tilestack.app.presets import home

        train = runpy.run_path(str(home() / "train.py"))["main"]
        return lambda options: train(options, prog="tilestack train")
    except ImportError as error:
        if (error.name or "tilestack").startswith("tilestack"):
            raise
        raise UserError(
            f"tilestack {command} cannot start: {error}; what it needs, in the right versions: "
            "pip install 'tilestack[train]'"
        ) from None
