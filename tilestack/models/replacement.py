"""One mechanism: a module's class is exchanged for a subclass of it whose forward calls our ops.

The subclass has the same name, parameters and constructor, so checkpoints, wrap policies, hooks and isinstance go on
working, and giving the module its old class back undoes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Replacement:
    """`ours` takes the place of `original`; with `only`, where the module's own name is that."""

    original: type[nn.Module]
    ours: type[nn.Module]
    only: str | None


REPLACEMENTS: list[Replacement] = []


def replaces(original: type[nn.Module], only: str | None = None) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Decorate a subclass of `original` that takes its place."""

    def record(ours: type[nn.Module]) -> type[nn.Module]:
        REPLACEMENTS.append(Replacement(original, ours, only))
        return ours

    return record


@dataclass(frozen=True)
class Slot:
    """A module that can be replaced: its name in the model, itself and the class it is to have."""

    name: str
    module: nn.Module
    ours: type[nn.Module]

    @property
    def is_ours(self) -> bool:
        return isinstance(self.module, self.ours)


def slots(model: nn.Module) -> Iterator[Slot]:
    """Every module of the model that one of ours can stand in for, the ones already replaced too."""
    for name, module in model.named_modules():
        for each in REPLACEMENTS:
            fits = type(module) is each.original or isinstance(module, each.ours)
            if fits and each.only in (None, name.rpartition(".")[2]):
                yield Slot(name, module, each.ours)
