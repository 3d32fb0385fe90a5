"""Tile choices of the Hopper kernels as data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Forward:
    """Constants of the kernel: CONSUMERS warpgroups of 64 queries, BLOCK_N keys of a tile, a head dimension of
    D + REST, STAGES of the rings of K and V, Q_SLOTS buffers of Q."""

    CONSUMERS: int
    BLOCK_N: int
    D: int
    REST: int
    STAGES: int
    Q_SLOTS: int


# By head dimension. Shared memory: (64 Q_SLOTS CONSUMERS + 2 STAGES BLOCK_N) (D + REST) * 2 bytes, 227 KB at most.
# Registers: BLOCK_N / 2 for scores, BLOCK_N / 4 for P and (D + REST) / 2 for out, of 240 (three consumers: 160).
FORWARD = {
    64: Forward(3, 128, 64, 0, 2, 2),  # exponentials take as long as products: a third consumer hides more of them
    96: Forward(2, 128, 64, 32, 2, 2),
    128: Forward(2, 128, 128, 0, 2, 2),
    192: Forward(2, 64, 128, 64, 2, 2),
    256: Forward(2, 64, 256, 0, 2, 1),
}


# Short sequences under a causal mask: of the tiles that a block of 192 queries meets, a third lies beyond the diagonal
# of 1,024. There an H100 ran two consumers at 338 TFLOP/s, three at 286; at 2,048 both at 415.
SHORT = 1024
SHORT_FORWARD = {64: Forward(2, 128, 64, 0, 2, 2)}


def forward_config(head_dim: int, causal: bool, length: int) -> Forward:
    """Of a head dimension that has tiles. length: of the longest sequence, -1 if unknown."""
    short = SHORT_FORWARD if causal and 0 < length <= SHORT else {}
    return short.get(head_dim, FORWARD[head_dim])


# Of a narrow window most tiles are masked, and one loop for all is less code to fetch. With 256, 1,024 and 4,096 keys
# to the left an H100 ran it at 347, 561 and 611 TFLOP/s, three loops at 287, 567 and 650 (D 128, 4,096 tokens, causal).
NARROW = 512  # between the first two


def one_loop(window_left: int) -> bool:
    """Whether one loop of the forward goes over all tiles. window_left: -1 is no limit."""
    return 0 <= window_left <= NARROW


def tile_size(head_dim: int) -> int:
    """The head dimension that the kernels run with: head_dim, or the next larger one that they have tiles for."""
    return min(size for size in FORWARD if size >= head_dim)


@dataclass(frozen=True)
class Backward:
    """Constants of the kernel: BLOCK_M queries and BLOCK_N keys of a tile, D + TAIL columns, STAGES of the rings of Q
    and dO, HEADS query heads of an item, CARRY: dK of a block runs beside the exponentials of the next, DQ_SHARED: dQ
    is added by TMA from shared memory, else from registers, APART: each warpgroup hands its own part of dQ to a warp
    that adds it, once the exponentials of the next block have run."""

    BLOCK_M: int
    BLOCK_N: int
    D: int
    TAIL: int
    STAGES: int
    HEADS: int
    CARRY: bool
    DQ_SHARED: bool
    APART: bool


BACKWARD = {  # by head dimension: BLOCK_M, BLOCK_N, D, TAIL, STAGES, CARRY, DQ_SHARED, APART
    64: (128, 128, 64, 0, 2, False, True, True),
    96: (64, 128, 64, 32, 3, True, True, False),
    128: (64, 128, 128, 0, 3, True, True, True),
    192: (64, 64, 128, 64, 2, False, True, False),
    256: (64, 64, 256, 0, 2, False, False, False),
}


DETERMINISTIC_UP_TO = 192  # head dimension; beyond, the block of dQ that waits for its turn finds no shared memory


def item_heads(group: int) -> int:
    """Two query heads an item: K and V are loaded for twice the work, and there are still items enough."""
    return 2 if group % 2 == 0 else 1


def adds_in_turn(deterministic: bool, deterministic_keys: bool, group: int) -> bool:
    """Whether items must add in a fixed order.

    dk and dv need none where at most two items add to them: a sum of two numbers is the same both ways.
    """
    return deterministic or (deterministic_keys and group > 2 * item_heads(group))


def backward_config(head_dim: int, group: int, softcap: bool, in_turn: bool) -> Backward:
    """Of a head dimension that has tiles. in_turn: items add in a fixed order."""
    block_m, block_n, main, tail, stages, carry, shared, apart = BACKWARD[head_dim]
    if softcap:  # one more tile of registers
        block_m, carry, apart = 64, False, False
    if in_turn and carry:  # dQ that is handed over a block later keeps the next item waiting: slower on an H100
        apart = False
    return Backward(block_m, block_n, main, tail, stages, item_heads(group), carry, shared, apart)


def _largest_divisor(n: int, limit: int) -> int:
    return max(divisor for divisor in range(1, n + 1) if n % divisor == 0 and divisor <= max(1, limit))


def forward_sections(batch: int, length: int, heads: int, kv_heads: int, head_dim: int) -> tuple[int, int]:
    """(documents, query heads) of a section: their keys and values take at most 20 MiB of a cache of 50 MB.

    Without sections, 16 key heads at 2,048 tokens ran at 346 TFLOP/s where they should run beside 577 (H100).
    """
    fitting = (20 << 20) // (length * head_dim * 4)  # key heads, K and V of 2 bytes
    if fitting >= kv_heads:
        return _largest_divisor(batch, fitting // kv_heads), heads
    return 1, _largest_divisor(kv_heads, fitting) * heads // kv_heads


def backward_section(n_columns: int, heads: int, length: int, head_dim: int) -> int:
    """How many columns (`heads` query heads each) run before the next: their Q, dO (2 bytes) and dQ (4) fit in L2.

    Measured on an H100: at 4,096 tokens 32 MiB is better than 16, 64 and 128; at 16,384 two columns than one.
    """
    return _largest_divisor(n_columns, max(2, (32 << 20) // (heads * length * head_dim * 8)))
