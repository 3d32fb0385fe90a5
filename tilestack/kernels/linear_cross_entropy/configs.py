"""Tile and chunk choices of linear_cross_entropy as data. README.md has the arithmetic behind them."""

from __future__ import annotations

from collections.abc import Iterator

import triton

MAX_LOGITS_BYTES = 600 * 2**20  # of one chunk: 2,048 rows of 151,936 bfloat16
ROW_MULTIPLE = 128  # rows of a cuBLAS tile
SCALE_BLOCK = 4096


def chunks(tokens: int, vocabulary: int, itemsize: int) -> Iterator[slice]:
    """Cut the tokens into the fewest chunks whose logits fit, all of nearly one size."""
    fitting = MAX_LOGITS_BYTES // (vocabulary * itemsize) // ROW_MULTIPLE * ROW_MULTIPLE
    n_chunks = triton.cdiv(tokens, max(ROW_MULTIPLE, fitting))
    rows = triton.cdiv(triton.cdiv(tokens, max(1, n_chunks)), ROW_MULTIPLE) * ROW_MULTIPLE
    return (slice(start, min(tokens, start + rows)) for start in range(0, tokens, max(1, rows)))


def softmax_tile(vocabulary: int) -> dict[str, int]:
    """One program a row: 16 logits a thread and block, so that two 16-byte loads are in flight in every thread."""
    block = min(8192, max(128, triton.next_power_of_2(vocabulary)))
    return {"BLOCK_V": block, "num_warps": max(1, block // 512)}
