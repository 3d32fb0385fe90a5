"""Which implementation of each op a model uses."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

from tilestack.kernels import UnsupportedError, ops
from tilestack.kernels.device import Device


@dataclass(frozen=True)
class KernelChoice:
    """The implementation of each op by name (`tilestack explain` lists them); "auto" leaves it to the dispatcher.

    Raises ValueError for a name that is no implementation of the op.
    """

    rms_norm: str = "auto"
    swiglu: str = "auto"
    qk_norm_rope: str = "auto"
    attention: str = "auto"
    router: str = "auto"
    moe: str = "auto"
    linear_cross_entropy: str = "auto"

    def __post_init__(self) -> None:
        for op, name in asdict(self).items():
            names = ["auto", *(each.name for each in ops()[op].implementations)]
            if name not in names:
                raise ValueError(f"kernels: {op}={name!r} is not one of {_listed(names)}{_nearest(name, names)}")

    def check(self, device: Device) -> None:
        """Raise UnsupportedError if an implementation that is named cannot run on the device, whatever the call."""
        for op, name in asdict(self).items():
            for each in ops()[op].implementations:
                reason = ops()[op].refuses_machine(each, device) if each.name == name else None
                if reason:
                    raise UnsupportedError(f"kernels.{op}: {name!r} cannot run here: {reason}")

    @staticmethod
    def of(choice: KernelChoice | Mapping[str, str] | None) -> KernelChoice:
        """A choice from what a user gave: a KernelChoice, a mapping from op to implementation, or None.

        Raises ValueError for an unknown op or implementation.
        """
        if isinstance(choice, KernelChoice):
            return choice
        names = [field.name for field in fields(KernelChoice)]
        for op in choice or {}:
            if op not in names:
                raise ValueError(f"kernels: {op!r} is not one of {_listed(names)}{_nearest(op, names)}")
        return KernelChoice(**(choice or {}))


def _listed(names: list[str]) -> str:
    return ", ".join(map(repr, names))


def _nearest(name: object, names: list[str]) -> str:
    close = difflib.get_close_matches(str(name), names, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
