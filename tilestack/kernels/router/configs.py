"""Tile choices of router as data."""

from __future__ import annotations

MAX_EXPERTS = 1024
MAX_TOP_K = 16  # the K chosen are found one after the other
WARPS = 4
PROGRAMS_PER_MULTIPROCESSOR = 4  # each keeps its own share of the two statistics
SUM_EXPERTS = 16  # of one program that adds the shares up
SUM_SHARES = 128  # shares that it takes at a time


def block_tokens(experts: int) -> int:
    """Tokens of one step: 16 values a thread, so that the keys (64 bits) and probabilities stay in registers."""
    return max(1, 2048 // experts)
