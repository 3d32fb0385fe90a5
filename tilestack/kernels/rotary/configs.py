"""Tile choices of rotary as data. Not measured: about 1,024 pairs of columns a program, which is 8 a thread."""

from __future__ import annotations

NUM_WARPS = 4
MAX_HEAD_DIM = 2048  # one token's head is a row of a tile
HEADS = 4  # of one program: cos and sin are loaded once for all of them


def block_tokens(block_half: int) -> int:
    """Tokens of one program."""
    return max(1, min(64, 1024 // block_half))
