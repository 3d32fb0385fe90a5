"""Cases of attention."""

from __future__ import annotations

import itertools

import torch

from tilestack.kernels import attention
from tilestack.testing.compare import Case, OpCases


def _dense(length_q: int, length_k: int, heads=(4, 2), head_dim=32, *, batch: int = 1, layout: str = "contiguous"):
    """layout: contiguous [B, S, H, D]; transposed: views of [B, H, S, D]; fused: slices of one projection's output."""

    def make(dtype, device, generator):
        def random(length, n_heads):
            if layout == "transposed":
                return _random((batch, n_heads, length, head_dim), dtype, device, generator).transpose(1, 2)
            return _random((batch, length, n_heads, head_dim), dtype, device, generator)

        if layout == "fused":
            q, k, v = random(length_q, sum(heads) + heads[1]).split((heads[0], heads[1], heads[1]), dim=2)
        else:
            q, k, v = random(length_q, heads[0]), random(length_k, heads[1]), random(length_k, heads[1])
        return {"q": q, "k": k, "v": v, "cu_seqlens_q": None, "cu_seqlens_k": None}

    return make


def _packed(lengths_q: tuple, lengths_k: tuple, heads=(2, 1), head_dim=32, *, spare: int = 0):
    """spare: rows after the last document, which belong to none."""

    def make(dtype, device, generator):
        def random(lengths, n_heads):
            return _random((sum(lengths) + spare, n_heads, head_dim), dtype, device, generator)

        return {
            "q": random(lengths_q, heads[0]),
            "k": random(lengths_k, heads[1]),
            "v": random(lengths_k, heads[1]),
            "cu_seqlens_q": _offsets(lengths_q, device),
            "cu_seqlens_k": _offsets(lengths_k, device),
        }

    return make


def _random(shape: tuple, dtype, device, generator) -> torch.Tensor:
    return torch.randn(shape, generator=generator).to(device, dtype)


def _offsets(lengths: tuple, device) -> torch.Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)


def _call(tensors, arguments, implementation):
    out, lse = attention(**tensors, **arguments, return_lse=True, implementation=implementation)
    return {"out": out, "lse": lse}


_CAUSAL = {"causal": True}
_DOCUMENTS = (33, 0, 1, 50, 0, 9)

CASES = OpCases(
    op="attention",
    call=_call,
    differentiable=("q", "k", "v"),
    cases=(
        Case("plain", "the common case, two in a batch", _dense(64, 64, batch=2)),
        Case("causal", "blocks before, on and after the diagonal", _dense(96, 96), _CAUSAL),
        Case("equal heads", "no group", _dense(40, 40, (2, 2)), _CAUSAL),
        Case("one key head", "the group is all heads", _dense(40, 40, (4, 1)), _CAUSAL),
        Case("one query", "decoding: every key is seen", _dense(1, 239), _CAUSAL),
        Case(
            "more keys", "lengths that no tile divides, aligned at the bottom right", _dense(113, 203, (2, 1)), _CAUSAL
        ),
        Case("more queries", "the first queries see no key", _dense(127, 64), _CAUSAL),
        Case("more queries, all seen", "as many loops over keys as there are queries", _dense(70, 33)),
        Case("no keys", "every query sees nothing", _dense(5, 0)),
        Case("no queries", "gradients of k and v are 0", _dense(0, 5)),
        Case("window", "blocks before the window are skipped", _dense(113, 113, (2, 2)), {"window_size": (40, 7)}),
        Case("causal window", "left and right bound", _dense(113, 203, (2, 1)), {"window_size": (37, -1), **_CAUSAL}),
        Case("left window", "no right bound", _dense(60, 50), {"window_size": (20, -1)}),
        Case("narrow window", "two keys, less than any tile", _dense(40, 40), {"window_size": (1, 0)}),
        Case("window, more queries", "whole blocks see no key", _dense(127, 64), {"window_size": (9, 3)}),
        Case("scale", "the scale is not the default", _dense(40, 40), {"softmax_scale": 0.4, **_CAUSAL}),
        Case("head dimension 8", "smaller than a tile may be", _dense(40, 40, (2, 1), 8), _CAUSAL),
        Case("head dimension 64", "a common model", _dense(40, 50, (2, 1), 64)),
        Case("head dimension 96", "no power of two: columns are masked", _dense(40, 40, (2, 1), 96), _CAUSAL),
        Case("head dimension 128", "Qwen3", _dense(50, 50, (2, 1), 128), _CAUSAL),
        Case("head dimension 256", "the largest", _dense(40, 40, (2, 1), 256), _CAUSAL),
        Case("transposed", "views of [B, H, S, D]", _dense(50, 70, batch=2, layout="transposed"), _CAUSAL),
        Case("fused", "q, k and v are slices of one tensor", _dense(50, 50, batch=2, layout="fused"), _CAUSAL),
        Case("packed", "documents of length 0 and 1 too", _packed(_DOCUMENTS, _DOCUMENTS), _CAUSAL),
        Case(
            "packed, lengths given",
            "max_seqlen is a promise, not a need",
            _packed(_DOCUMENTS, _DOCUMENTS),
            {"max_seqlen_q": 50, "max_seqlen_k": 50, **_CAUSAL},
        ),
        Case("packed, no mask", "documents end inside blocks", _packed(_DOCUMENTS, _DOCUMENTS)),
        Case("packed, other keys", "lengths differ both ways", _packed((20, 5, 0, 40), (3, 50, 9, 0)), _CAUSAL),
        Case(
            "packed, window",
            "each document has its own alignment",
            _packed((70, 9), (50, 40)),
            {"window_size": (20, 0)},
        ),
        Case("packed, spare rows", "rows after the last document give 0", _packed((40, 9), (20, 30), spare=37)),
        Case("packed, none", "no document at all", _packed((), (), spare=5)),
        Case("Qwen3-30B-A3B", "its length and groups, half its heads", _dense(4096, 4096, (16, 2), 128), _CAUSAL, True),
        Case("long window", "many blocks skipped", _dense(4096, 4096, (8, 2), 128), {"window_size": (500, 0)}, True),
        Case(
            "long documents",
            "many tiles a document",
            _packed((1000, 0, 3000, 1, 95), (1000, 0, 3000, 1, 95), (8, 2), 128),
            _CAUSAL,
            gpu_only=True,
        ),
        Case("decoding", "one query, many keys", _dense(1, 5000, (32, 4), 128, batch=4), _CAUSAL, gpu_only=True),
    ),
)
