"""Cases of attention."""

from __future__ import annotations

import itertools

import torch

from tilestack.kernels import attention
from tilestack.testing.compare import Case, OpCases


def _dense(
    length_q: int, length_k: int, heads=(4, 2), head_dim=32, *, batch: int = 1, layout: str = "contiguous", **features
):
    """layout: contiguous [B, S, H, D]; transposed: views of [B, H, S, D]; fused: slices of one projection's output.

    features: sinks, slopes ("shared" or "each": of each sequence its own), seed: tensors that the call gets too.
    """

    def make(dtype, device, generator):
        def random(length, n_heads):
            if layout == "transposed":
                return _random((batch, n_heads, length, head_dim), dtype, device, generator).transpose(1, 2)
            return _random((batch, length, n_heads, head_dim), dtype, device, generator)

        if layout == "fused":
            q, k, v = random(length_q, sum(heads) + heads[1]).split((heads[0], heads[1], heads[1]), dim=2)
        else:
            q, k, v = random(length_q, heads[0]), random(length_k, heads[1]), random(length_k, heads[1])
        offsets = {"cu_seqlens_q": None, "cu_seqlens_k": None}
        extra = _features(heads[0], batch, dtype, device, generator, **features)
        return {"q": q, "k": k, "v": v, **offsets, **extra}

    return make


def _packed(lengths_q: tuple, lengths_k: tuple, heads=(2, 1), head_dim=32, *, spare: int = 0, **features):
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
            **_features(heads[0], len(lengths_q), dtype, device, generator, **features),
        }

    return make


def _features(heads: int, sequences: int, dtype, device, generator, *, sinks=False, slopes=None, seed=False) -> dict:
    wide = torch.promote_types(dtype, torch.float32)
    found = {"sinks": None, "alibi_slopes": None, "dropout_seed": None}
    if sinks:
        found["sinks"] = _random((heads,), dtype, device, generator)
    if slopes:
        shape = (heads,) if slopes == "shared" else (sequences, heads)
        found["alibi_slopes"] = torch.rand(shape, generator=generator).to(device, wide)
    if seed:
        found["dropout_seed"] = torch.tensor([2**40 + 17, 2**33 + 5], device=device)
    return found


def _random(shape: tuple, dtype, device, generator) -> torch.Tensor:
    return torch.randn(shape, generator=generator).to(device, dtype)


def _offsets(lengths: tuple, device) -> torch.Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)


def _call(tensors, arguments, implementation):
    out, lse = attention(**tensors, **arguments, return_lse=True, implementation=implementation)
    return {"out": out, "lse": lse}


_CAUSAL = {"causal": True}
_DROPOUT = {"dropout_p": 0.2}
_EVERYTHING = {"softcap": 2.0, "window_size": (30, 0), **_DROPOUT}
_DOCUMENTS = (33, 0, 1, 50, 0, 9)

CASES = OpCases(
    op="attention",
    call=_call,
    differentiable=("q", "k", "v", "sinks"),
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
        Case("head dimension 59", "no multiple of 8: rows begin anywhere", _dense(40, 50, (2, 1), 59), _CAUSAL),
        Case("head dimension 80", "three quarters of a padded tile", _dense(20, 40, (2, 1), 80)),
        Case("head dimension 111", "odd and large", _dense(40, 20, (2, 1), 111), _CAUSAL),
        Case("head dimension 160", "padded to 256", _dense(20, 20, (1, 1), 160)),
        Case("head dimension 192", "padded to 256", _dense(20, 20, (1, 1), 192), _CAUSAL),
        Case("three keys", "queries by far outnumber keys", _dense(799, 3, (1, 1), 16), {"window_size": (400, 100)}),
        Case("soft cap", "it bends most scores", _dense(40, 50, (2, 1)), {"softcap": 1.5}),
        Case(
            "soft cap, packed, window",
            "masks come after the cap",
            _packed((33, 0, 50), (20, 3, 60)),
            {"softcap": 3.0, "window_size": (20, 3)},
        ),
        Case("sinks", "the first queries see nothing else", _dense(60, 40, sinks=True), _CAUSAL),
        Case("sinks, no keys", "lse is the sink", _dense(5, 0, sinks=True)),
        Case("sinks, no queries", "their gradient is 0", _dense(0, 5, sinks=True)),
        Case("sinks, packed, spare rows", "as queries without keys", _packed((40, 9), (20, 30), spare=7, sinks=True)),
        Case("ALiBi", "keys to both sides, one slope a head", _dense(20, 50, (2, 1), batch=2, slopes="shared")),
        Case(
            "ALiBi, packed",
            "each document has slopes, and its own alignment",
            _packed((33, 0, 1, 50), (20, 5, 40, 9), slopes="each", spare=5),
            _CAUSAL,
        ),
        Case(
            "dropout", "every sequence and head has its own mask", _dense(20, 50, (2, 1), batch=2, seed=True), _DROPOUT
        ),
        Case(
            "dropout, packed",
            "indices count from a document's start",
            _packed((33, 0, 1, 50), (33, 0, 1, 50), seed=True),
            {"dropout_p": 0.7, **_CAUSAL},
        ),
        Case(
            "everything, packed",
            "features meet: cap, bias, mask, sink, dropout, in this order",
            _packed((33, 1, 40), (20, 5, 50), (4, 2), sinks=True, slopes="each", seed=True),
            _EVERYTHING,
        ),
        Case("Qwen3-30B-A3B", "its length and groups, half its heads", _dense(4096, 4096, (16, 2), 128), _CAUSAL, True),
        Case("long window", "many blocks skipped", _dense(4096, 4096, (8, 2), 128), {"window_size": (500, 0)}, True),
        Case(
            "wide window",
            "many tiles no query cuts",
            _dense(4096, 4096, (8, 2), 128),
            {"window_size": (1500, 20)},
            True,
        ),
        Case(
            "long documents",
            "many tiles a document",
            _packed((1000, 0, 3000, 1, 95), (1000, 0, 3000, 1, 95), (8, 2), 128),
            _CAUSAL,
            gpu_only=True,
        ),
        Case(
            "everything, long documents",
            "all features over many tiles",
            _packed((1000, 0, 3000, 1, 95), (900, 3, 3000, 40, 95), (8, 2), 128, sinks=True, slopes="each", seed=True),
            {"softcap": 15.0, "window_size": (700, 0), **_DROPOUT},
            gpu_only=True,
        ),
        Case("long, sinks", "lengths differ by one", _dense(1024, 1023, (8, 2), 64, sinks=True), _CAUSAL, True),
        Case("long, soft cap", "Gemma 2's", _dense(2048, 2048, (4, 2), 256), {"softcap": 50.0, **_CAUSAL}, True),
        Case("long, ALiBi", "distances of thousands", _dense(2048, 2048, (4, 4), 96, slopes="shared"), _CAUSAL, True),
        Case("long, dropout", "many tiles of its mask", _dense(1024, 1023, (8, 2), 128, seed=True), _DROPOUT, True),
        Case("long, head dimension 192", "large tiles", _dense(1024, 1024, (4, 2), 192), _CAUSAL, True),
        Case("decoding", "one query, many keys", _dense(1, 5000, (32, 4), 128, batch=4), _CAUSAL, gpu_only=True),
    ),
)
