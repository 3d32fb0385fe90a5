"""Tile choices of sort_routes as data."""

from __future__ import annotations

MAX_EXPERTS = 1024
WARPS = 8
FEWEST_ROUTES = 512  # of one program
MOST_BLOCKS = 256  # each program reads the counts of all blocks


def block_routes(routes: int) -> int:
    """Routes of one program: a power of two, because it is a constant of the kernel."""
    return max(FEWEST_ROUTES, 1 << max(0, (routes - 1) // MOST_BLOCKS).bit_length())


def chunk(experts: int) -> int:
    """Routes compared with every expert at once: 32 integers a thread at 8 warps."""
    return max(16, min(64, 8192 // experts))
