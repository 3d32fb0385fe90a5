"""Tile choices of the Hopper kernels as data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Forward:
    """Constants of the kernel: BLOCK_M queries of an item (half for each consumer), BLOCK_N keys of a tile, STAGES of
    the rings of K and V."""

    BLOCK_M: int
    BLOCK_N: int
    STAGES: int


FORWARD = {  # by head dimension; shared memory: (2 BLOCK_M + 2 STAGES BLOCK_N) D * 2 bytes, 227 KB at most
    64: Forward(128, 128, 3),
    128: Forward(128, 128, 2),
}


@dataclass(frozen=True)
class Backward:
    """Constants of the kernel: BLOCK_M queries and BLOCK_N keys of a tile, STAGES of the rings of Q and dO, HEADS query
    heads of an item."""

    BLOCK_M: int
    BLOCK_N: int
    STAGES: int
    HEADS: int


def backward_config(head_dim: int, group: int) -> Backward:
    """Two query heads an item: K and V are loaded for twice the work, and there are still items enough."""
    return Backward(BLOCK_M=64, BLOCK_N=128, STAGES=2, HEADS=2 if group % 2 == 0 else 1)


def section(n_columns: int, heads: int, length: int, head_dim: int) -> int:
    """How many columns (`heads` query heads each) run before the next: their Q, dO (2 bytes) and dQ (4) fit in L2.

    Half of a 50 MB cache and more: measured, 16 and 64 MiB are slower.
    """
    fitting = max(1, (32 << 20) // (heads * length * head_dim * 8))
    return max(divisor for divisor in range(1, n_columns + 1) if n_columns % divisor == 0 and divisor <= fitting)
