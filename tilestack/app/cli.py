"""The installed command `tilestack`: one word more than train.py."""

from __future__ import annotations

import difflib
import importlib
import runpy
import sys

from tilestack.app.errors import UserError, reported
from tilestack.app.presets import home

USAGE = """usage: tilestack COMMAND [options]

  train     train a Qwen3-MoE; the same as python train.py
  explain   show, for a configuration and this machine, which kernel each op runs and why not another
  plan      what a training holds of the GPUs' memory, and which configurations fit, fastest first
  trace     run a few training steps and draw what really ran: ops, kernels, rates, a timeline
  doctor    is this machine ready to train, and what to do if it is not
  report    one page about a run: losses, speed, checkpoints, sample
  bench     time the kernels and the training step beside their rivals, on a GPU

tilestack COMMAND --help says more."""
MODULES = {
    "explain": "tilestack.app.explain",
    "plan": "tilestack.app.plan.command",
    "trace": "tilestack.app.trace.command",
    "doctor": "tilestack.app.doctor",
    "report": "tilestack.app.report",
    "bench": "tilestack.bench.cli",
}


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    words = sys.argv[1:] if argv is None else argv
    with reported():
        if not words or words[0] in ("-h", "--help"):
            print(USAGE)
            return 0
        command, options = words[0], words[1:]
        if command == "train":
            runpy.run_path(str(home() / "train.py"))["main"](options, prog="tilestack train")
            return 0
        if command in MODULES:
            return importlib.import_module(MODULES[command]).main(options) or 0
        close = difflib.get_close_matches(command, ["train", *MODULES], n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise UserError(f"unknown command {command!r}{hint}\n{USAGE}")
