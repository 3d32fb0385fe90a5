"""Tile choices of attention_kvcache as data.

A tile is block_m rows by block_n keys. A row is one query of one head; the heads that share a key head lie in one tile,
so that keys and values are read once for all of them.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from tilestack.kernels.device import Device

MAX_HEAD_DIM = 256
SHORT = 16  # rows of a sequence and key head that count as decoding: memory decides, not arithmetic


@dataclass(frozen=True)
class Tile:
    """programs: how many of them a multiprocessor holds at a time, which decides into how many splits keys are cut."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    programs: int


# by the padded head dimension, for 16-bit dtypes
HOPPER_DECODING = {  # the fastest of a sweep on an H100 on 2026-11-25: 16 to 64 sequences of 4096 keys
    64: Tile(16, 64, 4, 3, 4), 128: Tile(16, 64, 4, 3, 2), 256: Tile(16, 64, 4, 2, 1),
}  # fmt: skip
HOPPER_PREFILL = {  # the same day: 512 queries over 8192 keys, and 4096 over as many
    64: Tile(64, 64, 4, 3, 2), 128: Tile(64, 64, 4, 3, 2), 256: Tile(128, 64, 8, 2, 1),
}  # fmt: skip
LARGE_DECODING = {64: Tile(16, 64, 4, 3, 4), 128: Tile(16, 64, 4, 3, 2), 256: Tile(16, 32, 4, 3, 2)}  # sm_80, sm_100
LARGE_PREFILL = {64: Tile(64, 64, 4, 3, 2), 128: Tile(128, 64, 8, 3, 1), 256: Tile(64, 32, 8, 2, 1)}
# consumer GPUs (about 100 KiB of shared memory), AMD (64 KiB), the unknown
SMALL_DECODING = {64: Tile(16, 64, 4, 2, 2), 128: Tile(16, 64, 4, 2, 1), 256: Tile(16, 32, 4, 2, 1)}
SMALL_PREFILL = {64: Tile(64, 64, 4, 2, 1), 128: Tile(64, 32, 4, 2, 1), 256: Tile(32, 32, 4, 1, 1)}
# float32 has no tensor cores here: products are made of multiply-adds, which want many threads
FLOAT32_DECODING = Tile(16, 32, 8, 1, 1)
FLOAT32_PREFILL = {64: Tile(64, 32, 8, 1, 1), 128: Tile(32, 32, 8, 1, 1), 256: Tile(16, 32, 8, 1, 1)}
INTERPRETER_DECODING = Tile(16, 32, 4, 1, 1)
INTERPRETER_PREFILL = Tile(32, 32, 4, 1, 1)
LARGE = (LARGE_DECODING, LARGE_PREFILL)
BY_ARCH = {"sm_80": LARGE, "sm_90": (HOPPER_DECODING, HOPPER_PREFILL), "sm_100": LARGE, "sm_103": LARGE}

COMBINE_SPLITS = 16  # of one step of the kernel that adds splits up
COMBINE_WARPS = 4
MIN_BLOCKS = 2  # of keys in a split: fewer are not worth a program


def tile(device: Device, block_d: int, itemsize: int, rows: int) -> Tile:
    """The tile for a head dimension padded to `block_d`, elements of `itemsize` bytes, and as many rows a sequence."""
    decoding, width = rows <= SHORT, max(64, block_d)
    if device.type == "cpu":
        return INTERPRETER_DECODING if decoding else INTERPRETER_PREFILL
    if itemsize == 4:
        return FLOAT32_DECODING if decoding else FLOAT32_PREFILL[width]
    decoding_tiles, prefill_tiles = BY_ARCH.get(device.arch, (SMALL_DECODING, SMALL_PREFILL))
    return (decoding_tiles if decoding else prefill_tiles)[width]


@functools.lru_cache(1024)
def splits(programs: int, slots: int, blocks: int) -> int:
    """Into how many parts keys are cut: the fewest that keep `slots` nearly as busy as any number would.

    programs: what runs without a cut; blocks: of keys, at most, in a sequence. From shapes alone: lengths are known to
    the device only, and a kernel cuts each sequence's own keys evenly.
    """
    most = max(1, min(128, blocks // MIN_BLOCKS))
    busy = [0.0] + [programs * n / (slots * -(-programs * n // slots)) for n in range(1, most + 1)]
    enough = 0.9 * max(busy)
    return next(n for n in range(1, most + 1) if busy[n] >= enough)
