"""The grid: the cases of every op, one module an op, each with `CASES: OpCases`."""

from __future__ import annotations

import importlib
import pkgutil

from tilestack.testing.compare import OpCases


def all_cases() -> dict[str, OpCases]:
    """The cases of every op by the op's name."""
    names = [module.name for module in pkgutil.iter_modules(__path__)]
    return {name: importlib.import_module(f"{__name__}.{name}").CASES for name in names}
