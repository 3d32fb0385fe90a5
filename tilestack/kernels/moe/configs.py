"""Tile choices of moe as data."""

from __future__ import annotations

from dataclasses import dataclass

MAX_TOP_K = 16  # the sum over a token's routes is unrolled
SWIGLU_BLOCK = 1024  # elements of a row that the element-wise pass of the backward takes at a time


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
    """up: the product into 2I with its activation (n counts gate and up columns together, so half as many units);
    rows: the other products over an expert's rows (down, and both of the backward);
    weights: the products that contract over an expert's rows, which give the weights' gradients.
    """

    up: Tile
    rows: Tile
    weights: Tile


_INTERPRETER = Tiles(Tile(16, 32, 32, 4, 1), Tile(16, 32, 32, 4, 1), Tile(32, 32, 16, 4, 1))
_FLOAT32 = Tiles(Tile(64, 64, 32, 4, 2), Tile(64, 64, 32, 4, 2), Tile(64, 64, 32, 4, 2))
_LARGE = Tiles(Tile(128, 256, 64, 8, 3), Tile(128, 256, 64, 8, 3), Tile(128, 256, 64, 8, 3))
_MIDDLE = Tiles(Tile(128, 128, 32, 8, 3), Tile(128, 128, 32, 8, 3), Tile(128, 128, 32, 8, 3))
_SMALL = Tiles(Tile(128, 128, 32, 8, 2), Tile(128, 128, 32, 8, 2), Tile(128, 128, 32, 8, 2))
