"""Cases of moe."""

from __future__ import annotations

import torch

from tilestack.kernels import moe
from tilestack.testing.compare import Case, OpCases


def _random_ids(tokens: int, top_k: int, experts: int, generator: torch.Generator) -> torch.Tensor:
    return torch.rand(tokens, experts, generator=generator).argsort(-1)[:, :top_k]


def _one_takes_all(tokens: int, top_k: int, experts: int, generator: torch.Generator) -> torch.Tensor:
    return torch.full((tokens, top_k), experts - 2)


def _duplicates(tokens: int, top_k: int, experts: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(0, 2, (tokens, top_k), generator=generator)


def _partly_elsewhere(tokens: int, top_k: int, experts: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(-2, experts + 3, (tokens, top_k), generator=generator)


def _one_in_four(tokens: int, top_k: int, experts: int, generator: torch.Generator) -> torch.Tensor:
    here = torch.arange(top_k) == torch.randint(0, top_k, (tokens, 1), generator=generator)
    return torch.where(here, torch.randint(0, experts, (tokens, top_k), generator=generator), experts + 3)


def _all_elsewhere(tokens: int, top_k: int, experts: int, generator: torch.Generator) -> torch.Tensor:
    return torch.full((tokens, top_k), experts)


def _make(T: int, H: int, I: int, E: int, K: int, ids=_random_ids, *, weighted: bool = True, strided: bool = False):
    """Activations are of unit scale at every stage: small ones hide a wrong activation function."""

    def make(dtype, device, generator):
        def random(*size, scale=1.0):
            return (scale * torch.randn(*size, generator=generator)).to(device, dtype)

        weights = torch.rand(T, K, generator=generator) + 0.1
        return {
            "x": random(T, 2 * H)[:, :H] if strided else random(T, H),
            "gate_up": random(E, 2 * I, H, scale=H**-0.5),
            "down": random(E, H, I, scale=I**-0.5),
            "topk_ids": ids(T, K, E, generator).to(device, torch.int32),
            "topk_weights": (weights / weights.sum(-1, keepdim=True)).to(device) if weighted else None,
        }

    return make


def _call(tensors, arguments, implementation):
    return {"out": moe(**tensors, **arguments, implementation=implementation)}


CASES = OpCases(
    op="moe",
    call=_call,
    differentiable=("x", "gate_up", "down", "topk_weights"),
    cases=(
        Case("plain", "the common case", _make(37, 64, 48, 4, 2)),
        Case("one token", "most experts are empty", _make(1, 64, 48, 20, 16)),
        Case("one route a token", "rows that other ranks dispatched", _make(19, 64, 64, 3, 1, weighted=False)),
        Case("sixteen routes a token", "the largest K", _make(5, 16, 16, 20, 16)),
        Case("one expert takes all", "several row blocks of one expert", _make(140, 64, 64, 5, 2, _one_takes_all)),
        Case("duplicate routes", "an expert sees the same token twice", _make(21, 64, 64, 4, 4, _duplicates)),
        Case("partly elsewhere", "ids below 0 and beyond E are skipped", _make(23, 64, 192, 4, 3, _partly_elsewhere)),
        Case(
            "few of many elsewhere",
            "memory for the routes that are here alone",
            _make(70, 64, 64, 4, 4, _one_in_four),
            {"most_routes": 70},
        ),
        Case("all elsewhere", "no expert has a row", _make(6, 64, 64, 4, 2, _all_elsewhere)),
        Case("no tokens", "an empty batch", _make(0, 64, 64, 4, 2)),
        Case("strided", "x is a slice of a wider tensor", _make(9, 64, 64, 4, 2, strided=True)),
        Case("wide", "several tiles in every dimension, none full", _make(50, 80, 112, 2, 2)),
        Case("recompute", "the pre-activation is made again", _make(37, 64, 64, 4, 2), {"recompute": True}),
        Case("many experts", "more than tokens, and E is no power of two", _make(6, 16, 16, 140, 4)),
        Case("Qwen3-30B-A3B", "the real shape of an expert", _make(1000, 2048, 768, 16, 8), gpu_only=True),
        Case("Qwen3-235B-A22B", "a wider model", _make(300, 4096, 1536, 8, 4), gpu_only=True),
        Case("Qwen3-Next", "small experts, ten routes a token", _make(500, 2048, 512, 40, 10), gpu_only=True),
        Case("512 experts", "the largest E", _make(600, 64, 64, 512, 4), gpu_only=True),
    ),
)
