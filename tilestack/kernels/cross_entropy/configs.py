"""Tile choices of cross_entropy and its gradient as data. Not measured.

Eight elements a thread, which bf16 loads in 16 bytes: with sixteen, the forward spills on sm_90.
"""

from __future__ import annotations

BLOCK_V = 4096
NUM_WARPS = 16
