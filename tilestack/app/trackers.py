"""Experiment trackers, where installed and asked for. metrics.jsonl is written in any case."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any, Protocol

from tilestack.app.config import Config
from tilestack.app.errors import UserError
from tilestack.app.parse import to_plain


class Tracker(Protocol):
    """Takes records as they are measured."""

    def log(self, records: list[dict[str, Any]]) -> None: ...

    def close(self) -> None: ...


def check_trackers(names: list[str]) -> None:
    """Raise UserError for a tracker that is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"output.trackers: {name} is not installed; run: pip install {name}")


def open_trackers(config: Config, folder: Path) -> list[Tracker]:
    """The trackers of output.trackers, for a run in `folder`."""
    return [_KINDS[name](config, folder) for name in config.output.trackers]


class _TensorBoard:
    def __init__(self, config: Config, folder: Path):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(folder / "tensorboard")

    def log(self, records: list[dict[str, Any]]) -> None:
        for record in records:
            for name, value in _numbers(record).items():
                self._writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        self._writer.close()


class _WandbLike:
    """wandb, and trackio, which has wandb's interface."""

    def __init__(self, module: str, config: Config, folder: Path):
        self._module = importlib.import_module(module)
        self._module.init(project="tilestack", name=folder.name, config=to_plain(config))

    def log(self, records: list[dict[str, Any]]) -> None:
        for record in records:
            self._module.log(_numbers(record), step=record["step"])

    def close(self) -> None:
        self._module.finish()


_KINDS = {
    "tensorboard": _TensorBoard,
    "wandb": lambda config, folder: _WandbLike("wandb", config, folder),
    "trackio": lambda config, folder: _WandbLike("trackio", config, folder),
}


def _numbers(record: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in record.items() if isinstance(value, int | float) and name != "step"}
