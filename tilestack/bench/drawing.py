"""Random weights for a model that no rank has whole."""

from __future__ import annotations

import zlib

import torch


class DrawnInPlace:
    """Weights for a model without memory, so that no rank has what it does not keep: drawn where they lie.

    `tilestack.models.drawn` gives the same numbers for every split, but has the host draw them: minutes for 30 billion.
    """

    def __init__(self, std: float):
        self.std = std

    def fill(self, name: str, start: int, target: torch.Tensor) -> None:
        if "norm" in name:
            target.fill_(1.0)
            return
        generator = torch.Generator(target.device).manual_seed(zlib.crc32(f"{name} {start}".encode()))
        target.normal_(std=self.std, generator=generator)
