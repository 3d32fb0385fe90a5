"""Tile choices of moe as data."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tilestack.kernels.device import Device

MAX_TOP_K = 16  # the sum over a token's routes is unrolled
BLOCK_UNITS = 1024  # units of a row that the element-wise pass of the backward takes at a time
BLOCK_HIDDEN = 1024  # elements of a row that one program of the combination sums
ROW_WARPS = 4  # of both: 8 elements a thread, loaded at once
ROW_BLOCKS_CHUNK = 32  # row blocks whose expert one program looks up


@dataclass(frozen=True)
class Tile:
    """One program's share of a product: m rows by n columns, k at a time."""

    m: int
    n: int
    k: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Tiles:
    """The three kinds of product.

    up: into 2I, with its activation; n counts gate and up columns together.
    rows: the other products over an expert's rows (down, and the two of the backward).
    weights: those that contract over an expert's rows, which give the gradients of the weights.
    up and rows have the same m: they share one cutting of the rows into blocks.
    """

    up: Tile
    rows: Tile
    weights: Tile


def _same(tile: Tile) -> Tiles:
    return Tiles(tile, tile, tile)


_INTERPRETER = Tiles(Tile(16, 32, 32, 4, 1), Tile(16, 32, 32, 4, 1), Tile(32, 32, 16, 4, 1))  # loops run more than once
_FLOAT32 = _same(Tile(64, 64, 16, 4, 2))  # not for tensor cores: registers decide; k is short for exact sums
_WIDE = _same(Tile(128, 256, 64, 8, 3))  # 144 KiB of shared memory, one program a multiprocessor
_MIDDLE = _same(Tile(128, 128, 64, 8, 3))  # 96 KiB at most
_NARROW = _same(Tile(128, 128, 32, 8, 3))  # 48 KiB at most

_BY_ARCHITECTURE = {"sm_80": _MIDDLE, "sm_90": _WIDE, "sm_100": _WIDE, "sm_103": _WIDE}


def tiles(device: Device, dtype: torch.dtype) -> Tiles:
    """The tiles for a device and the dtype of x: chosen by register counts and stages, to be tuned by measurement."""
    if device.type == "cpu":
        return _INTERPRETER
    if dtype == torch.float32:
        return _FLOAT32
    return _BY_ARCHITECTURE.get(device.arch, _NARROW)
