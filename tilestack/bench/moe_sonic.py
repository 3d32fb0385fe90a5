"""SonicMoE (PyPI sonic-moe) as a rival of `tilestack bench moe`.

Its matrix products come from quack-kernels, whose autotuner compiles dozens of candidates of each at the first call,
with a pool of new processes for each product: minutes. Here it has four, the default among them, and chooses among
them for every shape; each candidate is compiled ahead, for all products, in one process.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable

import torch

PATIENCE_S = 180.0  # of a job that compiles
CANDIDATES = ((128, 192, True), (128, 256, False), (256, 128, False), (256, 192, False))  # tile m, tile n, ping-pong
TUNED = ("gemm_tuned", "gemm_gated_tuned", "gemm_dgated_tuned")


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


@functools.cache
def _limit_candidates(candidate: int | None) -> None:
    os.environ["QUACK_COMPILE_WORKERS"] = "1"  # no pool: what is on the disk needs none
    from quack import gemm_interface
    from quack.autotuner import AutotuneConfig
    from quack.gemm_config import GemmConfig

    chosen = [
        GemmConfig(tile_m=m, tile_n=n, pingpong=ping, cluster_m=2, cluster_n=1, is_dynamic_persistent=False)
        for m, n, ping in (CANDIDATES if candidate is None else CANDIDATES[candidate : candidate + 1])
    ]
    for name in TUNED:
        getattr(gemm_interface, name).configs = [AutotuneConfig(config=each) for each in chosen]
