"""SonicMoE (PyPI sonic-moe) as a rival of `tilestack bench moe`.

Its matrix products come from quack-kernels, whose autotuner compiles dozens of candidates of each at the first call,
with a pool of new processes for each product: minutes. Here it has four, the default among them, and chooses among
them for every shape; each product of each candidate is compiled ahead, in a process of its own. The sums over a token's
rows, in Triton, have 26 candidates twice; here four.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import torch

PATIENCE_S = 180.0  # of a job that compiles
CANDIDATES = ((128, 192, True), (128, 256, False), (256, 128, False), (256, 192, False))  # tile m, tile n, ping-pong
SUMS = ((512, 8, 4), (1024, 4, 4), (1024, 8, 8), (2048, 4, 8))  # columns, rows, warps
TUNED = ("gemm_tuned", "gemm_gated_tuned", "gemm_dgated_tuned")
# a forward without gradients: up, down; with: up, (down), through the activation, ddown, dx, dgate_up
CALLS, DISTINCT = 8, (0, 1, 2, 4, 5, 6, 7)
PIECES = tuple(itertools.product(range(len(CANDIDATES)), DISTINCT))  # of what is compiled ahead


def is_installed() -> bool:
    """Whether sonicmoe and what it needs can be found."""
    return all(importlib.util.find_spec(name) for name in ("sonicmoe", "quack", "cutlass"))


def block(problem, candidate: int | None = None) -> Callable[[], torch.Tensor]:
    """The block over the problem's own weights, whose layout it takes: a function without arguments, [T, H].

    candidate: the one of CANDIDATES that it gets; None: all, to choose from.
    """
    from sonicmoe import moe_TC_softmax_topk_layer
    from sonicmoe.enums import ActivationType

    _limit_candidates(candidate)
    gate_up, down = problem.gate_up.permute(1, 2, 0), problem.down.permute(1, 2, 0)

    def call() -> torch.Tensor:
        out, _, _ = moe_TC_softmax_topk_layer(
            problem.x, problem.gate, gate_up, None, down, None, problem.top_k,
            torch.cuda.current_stream().cuda_stream, ActivationType.SWIGLU, not torch.is_grad_enabled(),
            is_softmax_over_topk=False, norm_topk_probs=True, concat_layout=True,
        )  # fmt: skip
        return out

    return call


@contextmanager
def one_product(piece: tuple[int, int]) -> Iterator[None]:
    """Within, of the block's products, first without gradients and then with them, only that of PIECES runs."""
    from quack.autotuner import Autotuner
    from quack.gemm_interface import gemm_dgated_tuned

    calls, launch = itertools.count(), Autotuner.__call__

    def only_one(tuner, left, *args, **options):
        if next(calls) % CALLS == piece[1]:
            return launch(tuner, left, *args, **options)
        rows = len(args[1]) if tuner is gemm_dgated_tuned else 0
        return torch.zeros(rows, device=left.device)  # the router's gradient, which is used at once

    with mock.patch.object(Autotuner, "__call__", only_one):
        yield


@functools.cache
def _limit_candidates(candidate: int | None) -> None:
    os.environ["QUACK_COMPILE_WORKERS"] = "1"  # no pool: what is on the disk needs none
    import triton
    from quack import gemm_interface
    from quack.autotuner import AutotuneConfig
    from quack.gemm_config import GemmConfig
    from sonicmoe.functional.reduction_over_k_gather import token_gather_sum_kernel

    chosen = [
        GemmConfig(tile_m=m, tile_n=n, pingpong=ping, cluster_m=2, cluster_n=1, is_dynamic_persistent=False)
        for m, n, ping in (CANDIDATES if candidate is None else CANDIDATES[candidate : candidate + 1])
    ]
    for name in TUNED:
        getattr(gemm_interface, name).configs = [AutotuneConfig(config=each) for each in chosen]
    token_gather_sum_kernel.configs = [
        triton.Config({"BLOCK_H": columns, "BLOCK_K": rows}, num_warps=warps, num_stages=4)
        for columns, rows, warps in (SUMS if candidate is None else SUMS[:1])
    ]
