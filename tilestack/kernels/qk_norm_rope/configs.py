"""Tile choices of qk_norm_rope as data."""

from __future__ import annotations

MAX_HEAD_DIM = 256
NUM_WARPS = 4


def block_rows(block_half: int) -> int:
    """Heads in one tile: 8 elements of each half of a head a thread, one 16-byte load in bf16."""
    return max(1, 1024 // block_half)


def backward_programs(tiles: int, multiprocessors: int) -> int:
    """Programs of the backward kernel, each with its own share of the weights' gradients."""
    return max(1, min(tiles, 4 * multiprocessors))
