"""Tile choices of cross_entropy and its gradient as data. Not measured: 16 elements a thread, for wide loads."""

from __future__ import annotations

BLOCK_V = 4096
NUM_WARPS = 8
