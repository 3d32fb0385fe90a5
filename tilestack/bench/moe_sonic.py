"""SonicMoE (PyPI sonic-moe) as a rival of `tilestack bench moe`.

Its matrix products come from quack-kernels, whose autotuner compiles dozens of candidates at the first call, which
takes minutes. Here it has four for each product, the default among them.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable

import torch

PATIENCE_S = 240.0  # of its first call in a process, which compiles
CANDIDATES = ((128, 192, True), (128, 256, False), (256, 128, False), (256, 192, False))  # tile m, tile n, ping-pong
TUNED = ("gemm_tuned", "gemm_gated_tuned", "gemm_dgated_tuned")


def is_installed() -> bool:
    """Whether sonicmoe and what it needs can be found."""
    return all(importlib.util.find_spec(name) for name in ("sonicmoe", "quack", "cutlass"))


def block(problem) -> Callable[[], torch.Tensor]:
    """The block over the problem's own weights, whose layout it takes: a function without arguments, [T, H]."""
    from sonicmoe import moe_TC_softmax_topk_layer
    from sonicmoe.enums import ActivationType

    _limit_candidates()
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
def _limit_candidates() -> None:
    from quack import gemm_interface
    from quack.autotuner import AutotuneConfig
    from quack.gemm_config import GemmConfig

    chosen = [
        GemmConfig(tile_m=m, tile_n=n, pingpong=ping, cluster_m=2, cluster_n=1, is_dynamic_persistent=False)
        for m, n, ping in CANDIDATES
    ]
    for name in TUNED:
        getattr(gemm_interface, name).configs = [AutotuneConfig(config=each) for each in chosen]
