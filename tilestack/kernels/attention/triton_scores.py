"""What stands between a product of queries and keys and its weight: soft cap, ALiBi, dropout. Device functions that
the kernels share; a kernel without these features contains nothing of them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tilestack.kernels.attention import dropout
from tilestack.kernels.triton_numerics import exponent_unit, hyperbolic_tangent

ROUNDS = tl.constexpr(dropout.ROUNDS)


@triton.jit
def exponents(
    products, distance, softmax_scale, softcap, slope, HAS_SOFTCAP: tl.constexpr, HAS_ALIBI: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """(q . k as exponents in the kernel's unit, the hyperbolic tangent of the soft cap); distance: see `distances`."""
    tanh = 0.0
    if HAS_SOFTCAP:
        tanh = hyperbolic_tangent(products * (softmax_scale / softcap), PRECISION)
        scores = tanh * (softcap * exponent_unit(PRECISION))
    else:
        scores = products * (softmax_scale * exponent_unit(PRECISION))
    if HAS_ALIBI:
        scores -= tl.abs(distance).to(tl.float32) * (slope * exponent_unit(PRECISION))
    return scores, tanh


@triton.jit
def load_slope(slopes_ptr, stride_sequence, sequence, n_documents, head, HAS_ALIBI: tl.constexpr, PACKED: tl.constexpr):
    """A head's slope; what lies after the last document has none."""
    slope = 0.0
    if HAS_ALIBI:
        exists = sequence < n_documents if PACKED else True
        slope = tl.load(slopes_ptr + sequence * stride_sequence + head, mask=exists, other=0.0)
    return slope


@triton.jit
def load_seed(seed_ptr, HAS_DROPOUT: tl.constexpr):
    """(seed, offset modulo 2^32), as dropout.py wants them."""
    seed = 0
    offset = 0
    if HAS_DROPOUT:
        seed = tl.load(seed_ptr)
        offset = tl.load(seed_ptr + 1).to(tl.uint32)
    return seed, offset


@triton.jit
def kept(
    first_row, first_key, sequence_head, seed, offset, threshold, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """[BLOCK_M, BLOCK_N]: which probabilities dropout keeps; dropout.py has the definition. first_key: of a block."""
    blocks = first_key // 8 + tl.arange(0, BLOCK_N // 8)[None, :]
    rows = first_row + tl.arange(0, BLOCK_M)[:, None]
    blocks, rows = tl.broadcast(blocks, rows)
    zeros = tl.zeros_like(blocks)
    word0, word1, word2, word3 = tl.philox(seed, blocks, rows, zeros + sequence_head, zeros + offset, ROUNDS)
    words = tl.join(tl.join(word0, word2), tl.join(word1, word3)).reshape(BLOCK_M, BLOCK_N // 2)
    bits = tl.join(words & 0xFFFF, words >> 16).reshape(BLOCK_M, BLOCK_N)
    return bits < threshold
