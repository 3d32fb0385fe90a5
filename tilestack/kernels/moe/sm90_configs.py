"""Tile choices of the Hopper kernels of moe as data.

Every product has tiles of 128 x 256: two consumer warpgroups of 64 x 256 each, 64 deep a stage. A stage takes 48 KiB of
shared memory, a chunk of 64 x 64 that leaves through TMA 8 KiB; a block may have 227 KiB.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Product:
    """Constants of a kernel whose tiles leave through TMA.

    STAGES: of the ring of operands. CHUNKS: of 64 x 64 results that each consumer may have on their way out.
    *_REGISTERS: a thread's, of the second consumer and of the producer; the first consumer gets what is left.
    """

    STAGES: int
    CHUNKS: int
    CONSUMER_REGISTERS: int
    PRODUCER_REGISTERS: int


UP = Product(4, 2, 224, 56)  # the producer gathers, with 4 warps
ROWS = Product(4, 2, 240, 24)  # the producer is one warp: TMA alone
WEIGHTS = Product(4, 2, 224, 56)
WEIGHTS_AND_SUM = Product(4, 2, 184, 136)  # the producer's registers are those of the warps that add up, too


@dataclass(frozen=True)
class Activation:
    """Constants of the product through the activation: a whole tile (64 KiB) is on its way to the activation, which
    leaves room for three stages."""

    STAGES: int
    CONSUMER_REGISTERS: int
    SIDE_REGISTERS: int


ACTIVATION = Activation(3, 168, 168)

LAYOUT_CHUNK = 8  # row blocks that one program of the layout takes: [8, E] integers in its registers
LAYOUT_WARPS = 4
ROUTES_CHUNK = 1024  # routes whose partial weight gradients one program adds up
