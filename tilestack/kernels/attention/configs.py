"""Tile choices of the Triton kernels as data.

Chosen from registers, spills and shared memory of the compiled kernels, which `python -m tilestack.testing.offline
attention` prints, but where a measurement is named; to be settled by measurements on each GPU.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from tilestack.kernels.device import Device

MAX_HEAD_DIM = 256
SHORT = 16  # queries of a sequence that count as decoding: the forward then only streams the keys


@dataclass(frozen=True)
class Tile:
    """block_m queries by block_n keys."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Tiles:
    """The tiles of the three kernels."""

    forward: Tile
    dq: Tile
    dk_dv: Tile


# by the padded head dimension, for 16-bit dtypes
HOPPER = {  # 64 and 128: the fastest of a sweep on an H100 on 2026-11-22, causal, 4 x 4096 and 1 x 16384
    64: Tiles(Tile(128, 64, 8, 3), Tile(128, 64, 8, 3), Tile(64, 64, 4, 2)),
    128: Tiles(Tile(128, 64, 8, 3), Tile(128, 64, 8, 3), Tile(64, 128, 8, 2)),
    256: Tiles(Tile(128, 64, 8, 2), Tile(64, 64, 8, 1), Tile(64, 64, 8, 1)),
}
AMPERE = {
    64: Tiles(Tile(128, 64, 4, 3), Tile(128, 64, 8, 2), Tile(64, 128, 8, 2)),
    128: Tiles(Tile(128, 64, 8, 3), Tile(64, 64, 8, 2), Tile(64, 64, 8, 2)),
    256: Tiles(Tile(64, 64, 8, 2), Tile(32, 32, 4, 1), Tile(32, 32, 4, 1)),
}
BLACKWELL = {
    64: Tiles(Tile(128, 64, 8, 2), Tile(128, 64, 8, 2), Tile(64, 64, 8, 2)),
    128: Tiles(Tile(128, 64, 8, 2), Tile(128, 64, 8, 2), Tile(64, 64, 8, 2)),
    256: Tiles(Tile(64, 64, 8, 1), Tile(64, 64, 8, 1), Tile(64, 64, 8, 1)),
}
SMALL = {  # consumer GPUs (about 100 KiB of shared memory), AMD (64 KiB), the unknown
    64: Tiles(Tile(64, 64, 4, 2), Tile(64, 64, 4, 1), Tile(64, 64, 4, 1)),
    128: Tiles(Tile(64, 32, 4, 2), Tile(64, 32, 4, 1), Tile(32, 64, 4, 1)),
    256: Tiles(Tile(64, 32, 8, 1), Tile(32, 32, 4, 1), Tile(32, 32, 4, 1)),
}
FLOAT32 = {  # no tensor cores: products are made of fused multiply-adds, which want many threads
    64: Tiles(Tile(64, 32, 8, 1), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1)),
    128: Tiles(Tile(32, 32, 8, 1), Tile(32, 16, 8, 1), Tile(16, 32, 8, 1)),
    256: Tiles(Tile(16, 32, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
}
INTERPRETER = Tiles(Tile(32, 32, 4, 1), Tile(32, 32, 4, 1), Tile(32, 32, 4, 1))
SHORT_FORWARD = {64: Tile(16, 64, 4, 3), 128: Tile(16, 64, 4, 2), 256: Tile(16, 32, 4, 2)}
SHORT_FORWARD_FLOAT32 = Tile(16, 32, 8, 1)
BY_ARCH = {"sm_80": AMPERE, "sm_90": HOPPER, "sm_100": BLACKWELL, "sm_103": BLACKWELL}


def tiles(device: Device, block_d: int, itemsize: int, longest_q: int) -> Tiles:
    """The tiles for a head dimension padded to `block_d` and elements of `itemsize` bytes.

    longest_q: no sequence has more queries.
    """
    if device.type == "cpu":
        chosen = INTERPRETER
    elif itemsize == 4:
        chosen = FLOAT32[max(64, block_d)]
    else:
        chosen = BY_ARCH.get(device.arch, SMALL)[max(64, block_d)]
    if longest_q <= SHORT:
        short = SHORT_FORWARD_FLOAT32 if itemsize == 4 else SHORT_FORWARD[max(64, block_d)]
        return dataclasses.replace(chosen, forward=short)
    return chosen
