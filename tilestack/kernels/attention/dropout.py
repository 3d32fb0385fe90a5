"""Dropout of attention: which probabilities are kept, as a pure function of a seed and a position.

    bits = Philox4x32-7(key = seed, counter = (key index // 8, query index, sequence * Hq + head, offset mod 2^32))
    keep = the (key index % 8)-th 16 bits of the 128, lowest first, < round((1 - p) * 2^16)

A sequence is an element of a dense batch or a document of packed input; indices count from its start. So the mask
depends neither on tiles nor on the implementation, and backward makes it anew. 16 bits make the expectation of what is
kept right to 2^-17. Philox: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011), table 2: 7 rounds pass
BigCrush.
"""

from __future__ import annotations

import torch

ROUNDS = 7
_WORD = 2**32 - 1
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_POSITIONS = 8  # keys whose 16 bits come from one call of Philox


def draw_seed(device: torch.device, generator: torch.Generator | None = None) -> torch.Tensor:
    """(seed, offset), int64 [2], from the generator (None: the device's default one); nothing is read on the host."""
    return torch.randint(2**63 - 1, (2,), dtype=torch.int64, device=device, generator=generator)


def threshold(dropout_p: float) -> int:
    """16 bits below this number are kept."""
    return round((1 - dropout_p) * 2**16)


def dropout_mask(
    dropout_seed: torch.Tensor,
    dropout_p: float,
    batch: int,
    heads: int,
    length_q: int,
    length_k: int,
    first: int = 0,
) -> torch.Tensor:
    """The probabilities that `attention` keeps: [batch, heads, length_q, length_k] bool, on the device of the seed.

    dropout_seed: (seed, offset), int64 [2]; dropout_p: in [0, 1).
    first: the index of the first sequence: of document d of packed input, (batch=1, first=d).
    """
    device = dropout_seed.device
    blocks = -(-length_k // _POSITIONS)
    seed, offset = dropout_seed.unbind()
    sequence_heads = torch.arange(first * heads, (first + batch) * heads, device=device)
    counter = (
        torch.arange(blocks, device=device),
        torch.arange(length_q, device=device)[:, None],
        sequence_heads[:, None, None],
        offset & _WORD,
    )
    words = torch.stack(torch.broadcast_tensors(*philox(seed & _WORD, (seed >> 32) & _WORD, *counter)), -1)
    bits = torch.stack((words & 0xFFFF, words >> 16), -1)
    keep = bits.reshape(batch, heads, length_q, blocks * _POSITIONS) < threshold(dropout_p)
    return keep[..., :length_k]


def philox(key_low, key_high, c0, c1, c2, c3) -> tuple[torch.Tensor, ...]:
    """Four words of 32 bits in int64, whose product wraps around and keeps its upper word."""
    for _ in range(ROUNDS):
        first, second = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (second >> 32) & _WORD ^ c1 ^ key_low,
            second & _WORD,
            (first >> 32) & _WORD ^ c3 ^ key_high,
            first & _WORD,
        )
        key_low, key_high = (key_low + _KEY_STEPS[0]) & _WORD, (key_high + _KEY_STEPS[1]) & _WORD
    return c0, c1, c2, c3
