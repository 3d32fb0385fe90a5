"""Tile choices of adamw as data."""

from __future__ import annotations

# 8 elements a thread: one 16-byte load of a bf16 gradient and two of each float32 state, seven in flight in all
BLOCK = 1024
NUM_WARPS = 4
