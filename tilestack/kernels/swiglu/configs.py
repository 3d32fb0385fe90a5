"""Tile choices of swiglu as data."""

from __future__ import annotations

MAX_BLOCK = 2048  # 16 elements a thread at 4 warps: two 16-byte loads of each operand in flight in bf16


def block(width: int) -> int:
    """Elements of one row that a program takes: a power of two, no more than a row needs."""
    return max(16, min(MAX_BLOCK, 1 << (width - 1).bit_length()))


def warps(block: int) -> int:
    """Warps for a block: 16 elements a thread."""
    return max(1, block // 512)
