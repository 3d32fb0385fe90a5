"""Gradients of weights that every row shares: the second half of a deterministic, two-launch sum.

A backward kernel gives each of its programs a share, one float32 row; the kernel here sums the shares in a fixed
order. No atomics, so the same input gives the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tilestack.kernels import launch


@triton.jit(do_not_specialize=["n_shares"])
def sum_shares_kernel(
    shares_ptr, first_ptr, second_ptr, stride, n_shares, H, BLOCK_H: tl.constexpr, BLOCK_S: tl.constexpr
):  # fmt: skip
    offs_h = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    shares_ptr += tl.program_id(1) * H
    total = tl.zeros([BLOCK_S, BLOCK_H], tl.float32)
    for start in range(0, n_shares, BLOCK_S):
        offs_s = start + tl.arange(0, BLOCK_S)
        mask = (offs_s < n_shares)[:, None] & (offs_h < H)[None, :]
        total += tl.load(shares_ptr + offs_s[:, None] * stride + offs_h[None, :], mask=mask, other=0.0)
    total = tl.sum(total, 0)
    if tl.program_id(1) == 0:
        tl.store(first_ptr + offs_h, total.to(first_ptr.dtype.element_ty), mask=offs_h < H)
    else:
        tl.store(second_ptr + offs_h, total.to(second_ptr.dtype.element_ty), mask=offs_h < H)


def sum_shares(shares: torch.Tensor, *weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Gradients of the shape and dtype of one or two `weights`, all [H], in one launch.

    shares: float32 [programs, H], or [programs, 2, H] for two weights, rows contiguous.
    """
    gradients = tuple(torch.empty_like(each, memory_format=torch.contiguous_format) for each in weights)
    # narrow and high: latency, not bandwidth, bounds this kernel. On an H100, 528 shares of 2,048 take 9.7 us in
    # tiles of 32 x 128 with 4 warps, 7.7 in 16 x 256 with 4, 6.4 in 16 x 512 with 8
    block_h, hidden = 16, shares.shape[-1]
    with launch.on_device(shares):
        launch.run(
            sum_shares_kernel, (launch.cdiv(hidden, block_h), len(gradients)),
            shares, gradients[0], gradients[-1], shares.stride(0), shares.shape[0], hidden,
            BLOCK_H=block_h, BLOCK_S=512, num_warps=8,
        )  # fmt: skip
    return gradients
