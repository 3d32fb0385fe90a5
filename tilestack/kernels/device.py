"""What the dispatcher needs to know about a device: facts, never a handle."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Device:
    """A device as the dispatcher sees it.

    type: "cpu" or "cuda" (ROCm devices also answer to "cuda", as in torch).
    arch: "cpu", "sm_90", "gfx942", ...
    name: the marketing name, for people.
    """

    type: str
    arch: str
    name: str

    @property
    def capability(self) -> int | None:
        """90 for sm_90; None where the notion has no meaning."""
        return int(self.arch[3:]) if self.arch.startswith("sm_") else None

    @staticmethod
    def of(device: torch.device | str) -> Device:
        """The facts of a torch device, looked up once per device."""
        device = torch.device(device)
        index = device.index
        if device.type == "cuda" and index is None:
            index = torch.cuda.current_device()
        key = (device.type, index)
        if key not in _FACTS:
            _FACTS[key] = _look_up(*key)
        return _FACTS[key]

    @staticmethod
    def current() -> Device:
        """The device that work goes to by default on this machine."""
        return Device.of("cuda" if torch.cuda.is_available() else "cpu")


_FACTS: dict[tuple[str, int | None], Device] = {}  # a plain dict: torch.compile warns of functools.cache


def _look_up(kind: str, index: int | None) -> Device:
    if kind != "cuda":
        return Device(kind, kind, kind)
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return Device("cuda", properties.gcnArchName.split(":")[0], properties.name)
    return Device("cuda", f"sm_{properties.major}{properties.minor}", properties.name)


def interpreting() -> bool:
    """True when Triton kernels run on the CPU, in Triton's interpreter (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET") == "1"
