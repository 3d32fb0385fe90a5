"""Cases of sort_routes."""

from __future__ import annotations

import torch

from tilestack.kernels import sort_routes
from tilestack.testing.compare import Case, OpCases


def _make(T: int, K: int, low: int, high: int, dtype: torch.dtype = torch.int32):
    def make(_, device, generator):
        return {"topk_ids": torch.randint(low, high, (T, K), generator=generator).to(device, dtype)}

    return make


def _call(tensors, arguments, implementation):
    return sort_routes(**tensors, **arguments, implementation=implementation)._asdict()


def _case(name: str, why: str, make, num_experts: int, gpu_only: bool = False) -> Case:
    return Case(name, why, make, {"num_experts": num_experts}, gpu_only)


CASES = OpCases(
    op="sort_routes",
    call=_call,
    differentiable=(),
    dtypes=(torch.float32,),  # of no tensor: the ids are integers
    cases=(
        _case("plain", "the common case, with duplicates", _make(37, 4, 0, 16), 16),
        _case("several blocks", "a block begins where those before it ended", _make(700, 3, 0, 10), 10),
        _case("one expert takes all", "a run of equal ids over blocks", _make(300, 4, 2, 3), 5),
        _case("partly elsewhere", "ids below 0 and beyond E", _make(300, 4, -3, 9), 5),
        _case("all elsewhere", "no route has an expert", _make(10, 2, 8, 9), 8),
        _case("far elsewhere", "ids that do not fit into 32 bits", _make(40, 2, 2**33, 2**33 + 4, torch.int64), 8),
        _case("64-bit ids", "what torch.topk gives", _make(37, 4, 0, 16, torch.int64), 16),
        _case("512 experts", "the largest E", _make(100, 8, 0, 512), 512),
        _case("one expert", "E = 1", _make(20, 2, 0, 1), 1),
        _case("one route", "T = K = 1", _make(1, 1, 0, 4), 4),
        _case("no tokens", "an empty batch", _make(0, 4, 0, 16), 16),
        _case("Qwen3-30B-A3B", "the real shape", _make(16384, 8, 0, 128), 128, gpu_only=True),
    ),
)
