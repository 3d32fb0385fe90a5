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
    """`ours` takes the place of `original`; with `child` = (class, name), only as the child `name` of that class."""

    original: type[nn.Module]
    ours: type[nn.Module]
    child: tuple[type[nn.Module], str] | None


REPLACEMENTS: list[Replacement] = []


def replaces(
    original: type[nn.Module], child: tuple[type[nn.Module], str] | None = None
) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Decorate a subclass of `original` that takes its place."""

    def record(ours: type[nn.Module]) -> type[nn.Module]:
        REPLACEMENTS.append(Replacement(original, ours, child))
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
            if fits and _is_child(model, name, each.child):
                yield Slot(name, module, each.ours)


def _is_child(model: nn.Module, name: str, child: tuple[type[nn.Module], str] | None) -> bool:
    parent, _, own_name = name.rpartition(".")
    return child is None or (own_name == child[1] and isinstance(model.get_submodule(parent), child[0]))
