"""What a run shows while it goes: a bar on a terminal, plain lines in a file or a CI log."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Display:
    """The progress of a run. `quiet` shows nothing (ranks other than 0)."""

    def __init__(self, first: int, steps: int, quiet: bool = False):
        self.console = Console(quiet=quiet, highlight=False, soft_wrap=True)
        self._first, self._steps = first, steps
        self._progress: Progress | None = None
        if self.console.is_terminal and not self.console.is_dumb_terminal:
            self._progress = Progress(
                TextColumn("[bold]step"),
                MofNCompleteColumn(),
                BarColumn(bar_width=20),
                TextColumn("{task.description}"),
                TimeRemainingColumn(),
                console=self.console,
            )
            self._task = self._progress.add_task("starting", total=steps, completed=first)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Show progress inside the block."""
        if self._progress is None:
            yield
        else:
            with self._progress:
                yield

    def say(self, text: str) -> None:
        """Print a line; the bar stays below."""
        self.console.print(text, markup=False)

    def update(self, records: list[dict[str, Any]]) -> None:
        """Show the newest record."""
        if not records:
            return
        record = records[-1]
        if self._progress is not None:
            self._progress.update(self._task, completed=record["step"], description=in_words(record))
        else:
            done = record["step"] - self._first
            left = record["seconds"] / done * (self._steps - record["step"])
            self.say(f"step {record['step']:>5}/{self._steps}  {in_words(record)}  left {duration(left)}")
        if "eval_loss" in record:
            self.say(f"step {record['step']:>5}: loss on held-out text {record['eval_loss']:.4f}")


def in_words(record: dict[str, Any]) -> str:
    """The record in one short line."""
    parts = [f"loss {record['loss']:.4f}", f"lr {record['lr']:.2e}", f"{record['tokens_per_second']:,.0f} tokens/s"]
    parts.append("MFU n/a" if record["mfu"] is None else f"MFU {record['mfu']:.1%}")
    if record["expert_load"] is not None:
        parts.append(f"expert load max/mean {record['expert_load']:.2f}")
    parts.append(f"{record['memory_gib']:.1f} GiB")
    return "  ".join(parts)


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
