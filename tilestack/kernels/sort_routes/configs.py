"""Tile choices of sort_routes as data."""

from __future__ import annotations

MAX_EXPERTS = 1024
BLOCK_ROUTES = 128  # routes of one program, every two of which are compared
WARPS = 4
SCAN_EXPERTS = 16  # of one scanning program: 64 bytes of each row of counts
SCAN_BLOCKS = 512  # rows of counts that it takes at a time: 32 integers a thread
SCAN_WARPS = 8


def chunk(experts: int) -> int:
    """Routes compared with every expert at once: 64 integers a thread at 4 warps."""
    return max(8, min(BLOCK_ROUTES, 8192 // experts))
