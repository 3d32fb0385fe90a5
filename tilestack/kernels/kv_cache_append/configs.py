"""Tile choices of kv_cache_append as data."""

from __future__ import annotations

ELEMENTS = 1024  # of one tile of k: 8 heads of 128 numbers, 8 numbers (16 bytes of a 16-bit dtype) for each thread
NUM_WARPS = 4


def block_rows(block_d: int) -> int:
    """Rows of a tile, of `block_d` columns each."""
    return max(1, ELEMENTS // block_d)
