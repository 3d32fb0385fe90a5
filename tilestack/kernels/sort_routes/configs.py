"""Tile choices of sort_routes as data."""

from __future__ import annotations

MAX_EXPERTS = 1024
BLOCK_ROUTES = 512  # routes of one program: 256 programs for 16k tokens with 8 routes each
SCAN_BLOCKS = 32  # rows of counts that the one scanning program takes at a time
WARPS = 8


def chunk(experts: int) -> int:
    """Routes compared with every expert at once: at most 64 integers a thread at 8 warps."""
    return max(16, min(128, 16384 // experts))
