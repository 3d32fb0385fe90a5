"""The sum over each token's routes, in Triton: the end of both implementations of moe, forwards and backwards."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tilestack.kernels import launch
from tilestack.kernels.moe.configs import BLOCK_HIDDEN, ROW_WARPS


@triton.jit
def moe_combine_kernel(
    rows_ptr, weights_ptr, route_to_row_ptr, out_ptr, H,
    TOP_K: tl.constexpr, BLOCK_H: tl.constexpr, HAS_WEIGHTS: tl.constexpr,
):  # fmt: skip
    # out[t] = sum over k of weights[t, k] * rows[row of route t * K + k], in the order of k
    token = tl.program_id(0)
    offs = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    acc = tl.zeros([BLOCK_H], tl.float32)
    for k in tl.static_range(TOP_K):
        route = token * TOP_K + k
        row = tl.load(route_to_row_ptr + route)
        ptrs = rows_ptr + row.to(tl.int64) * H + offs
        value = tl.load(ptrs, mask=(offs < H) & (row >= 0), other=0.0).to(tl.float32)
        if HAS_WEIGHTS:
            value *= tl.load(weights_ptr + route)
        acc += value
    tl.store(out_ptr + token.to(tl.int64) * H + offs, acc.to(out_ptr.dtype.element_ty), mask=offs < H)


def combine(rows: torch.Tensor, weights: torch.Tensor | None, route_to_row: torch.Tensor, top_k: int) -> torch.Tensor:
    """[T, H]: the sum over each token's rows [R, H], weighted by [T, K] or not; a route without a row (-1) adds 0."""
    tokens, hidden = route_to_row.numel() // top_k, rows.shape[1]
    out = rows.new_empty((tokens, hidden))
    block = min(BLOCK_HIDDEN, launch.next_power_of_2(hidden))
    with launch.on_device(rows):
        launch.run(
            moe_combine_kernel, (tokens, launch.cdiv(hidden, block)),
            rows, rows if weights is None else weights.contiguous(), route_to_row, out, hidden,
            TOP_K=top_k, BLOCK_H=block, HAS_WEIGHTS=weights is not None, num_warps=ROW_WARPS,
        )  # fmt: skip
    return out
