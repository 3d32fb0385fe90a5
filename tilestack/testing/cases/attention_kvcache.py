"""Cases of attention_kvcache. What lies behind the end of a sequence is NaN: nothing may read it."""

from __future__ import annotations

import itertools

import torch

from tilestack.kernels import attention_kvcache
from tilestack.testing.cases.kv_cache_append import integers, pages, random, rotary_tables
from tilestack.testing.compare import Case, OpCases


def _make(
    length_q: int | tuple, seqlens: tuple | None, room: int, heads: tuple = (4, 2), head_dim: int = 32, *,
    page: int = 0, batch: int = 0, new: int = 0, leftpad: tuple | None = None, batch_idx: tuple | None = None,
    spare: int = 0, slopes: int = 0, sinks: bool = False, rotary_dim: int = 0, layout: str = "contiguous",
):  # fmt: skip
    """length_q: of each sequence; a tuple is packed, with `spare` queries of no sequence behind.

    seqlens: keys in the cache, not counting `new` ones; None: it is full. slopes: dimensions of alibi_slopes.
    layout: of the caches: contiguous; "heads first": views of [B, H, S, D]; "joined": halves of one tensor.
    """

    def make(dtype, device, generator):
        packed = isinstance(length_q, tuple)
        n = batch or len(length_q if packed else seqlens)
        max_pages = -(-room // page) if page else 0
        rows = (n * max_pages, page) if page else (max(batch_idx) + 1 if batch_idx else n, room)
        caches = _caches((*rows, heads[1], head_dim), layout, dtype, device, generator)
        table = pages(n, max_pages, device, generator) if page else None
        for sequence, length in enumerate(seqlens or ()):
            row = batch_idx[sequence] if batch_idx else sequence
            for cache in caches:
                _poison(cache, max(length + new, 0), row, None if table is None else table[sequence].long())
        cos, sin = rotary_tables(room, rotary_dim, dtype, device) if rotary_dim else (None, None)
        wide = torch.promote_types(dtype, torch.float32)
        leading = (sum(length_q) + spare,) if packed else (n, length_q)
        return {
            "q": random((*leading, heads[0], head_dim), dtype, device, generator),
            "k_cache": caches[0],
            "v_cache": caches[1],
            "cache_seqlens": None if seqlens is None else integers(seqlens, device),
            "block_table": table,
            "cache_batch_idx": None if batch_idx is None else integers(batch_idx, device),
            "cache_leftpad": None if leftpad is None else integers(leftpad, device),
            "cu_seqlens_q": integers((0, *itertools.accumulate(length_q)), device) if packed else None,
            "sinks": random((heads[0],), dtype, device, generator) if sinks else None,
            "alibi_slopes": random((n, heads[0])[2 - slopes :], wide, device, generator).abs() if slopes else None,
            "rotary_cos": cos,
            "rotary_sin": sin,
        }

    return make


def _caches(shape: tuple, layout: str, dtype, device, generator) -> tuple[torch.Tensor, torch.Tensor]:
    if layout == "joined":
        return random((2, *shape), dtype, device, generator).unbind()
    if layout == "heads first":
        shape = (shape[0], shape[2], shape[1], shape[3])
        return tuple(random(shape, dtype, device, generator).transpose(1, 2) for _ in range(2))
    return tuple(random(shape, dtype, device, generator) for _ in range(2))


def _poison(cache: torch.Tensor, taken: int, row: int, own_pages: torch.Tensor | None) -> None:
    if own_pages is None:
        cache[row, taken:] = torch.nan
        return
    full, rest = divmod(taken, cache.shape[1])
    cache[own_pages[full : full + 1], rest:] = torch.nan
    cache[own_pages[full + 1 :]] = torch.nan


def _call(tensors, arguments, implementation):
    out, lse = attention_kvcache(**tensors, **arguments, return_lse=True, implementation=implementation)
    return {"out": out, "lse": lse}


_CAUSAL = {"causal": True}
_TWO, _FIVE = {"num_splits": 2}, {"num_splits": 5}

CASES = OpCases(
    op="attention_kvcache",
    call=_call,
    differentiable=(),
    cases=(
        Case("plain", "a decoding step", _make(1, (70, 33), 96), _CAUSAL),
        Case("paged", "a block lies in one page", _make(1, (70, 33), 96, page=32), _CAUSAL),
        Case("small pages", "a block lies on several pages", _make(1, (70, 33), 96, page=16), _CAUSAL),
        Case("odd pages", "pages and blocks do not divide each other", _make(3, (70, 33), 96, page=48), _CAUSAL),
        Case("large pages", "a page holds many blocks", _make(1, (300, 33), 512, page=256), _CAUSAL),
        Case("full cache", "no lengths are given", _make(1, None, 50, batch=2)),
        Case("full pages", "nor in a paged cache", _make(1, None, 64, batch=2, page=16)),
        Case("chunk", "queries of a prefill, aligned at the bottom right", _make(20, (70, 40, 99), 128), _CAUSAL),
        Case("chunk, paged", "the same in pages", _make(20, (70, 40, 99), 128, page=16), _CAUSAL),
        Case("chunk, no mask", "every query sees every key", _make(5, (70, 33), 96)),
        Case("more queries than keys", "the first queries see no key", _make(20, (9, 33), 64), _CAUSAL),
        Case("no keys", "a sequence that has none", _make(2, (0, 33), 64), _CAUSAL),
        Case("lengths out of range", "are taken for an empty and a full cache", _make(1, (-3, 70), 64)),
        Case("no queries", "an empty chunk", _make(0, (9, 33), 64)),
        Case("no sequence", "an empty batch", _make(1, (), 64)),
        Case("one key head", "the group is all heads", _make(3, (70, 33), 96, (7, 1)), _CAUSAL),
        Case("equal heads", "no group", _make(1, (70, 33), 96, (2, 2)), _CAUSAL),
        Case("large group", "a token's heads fill more than a tile", _make(1, (70, 33), 96, (48, 1)), _CAUSAL),
        Case("batch rows", "sequences are elsewhere in the cache", _make(1, (70, 33), 96, batch_idx=(3, 1)), _CAUSAL),
        Case("left padding", "keys do not begin at 0", _make(2, (70, 33, 5), 96, leftpad=(3, 20, 5)), _CAUSAL),
        Case("new keys", "the end is behind cache_seqlens", _make(3, (62, 0), 65, new=3), _CAUSAL | {"new_keys": 3}),
        Case("window", "bound on both sides", _make(20, (70, 99), 128), {"window_size": (20, 5)}),
        Case("window, paged", "whole pages are skipped", _make(4, (70, 99), 128, page=16), {"window_size": (20, 5)}),
        Case("causal window", "decoding in a window", _make(1, (70, 99), 128), {"window_size": (33, 0)}),
        Case("left window", "no right bound", _make(20, (30, 99), 128), {"window_size": (20, -1)}),
        Case("wide window", "wider than the cache is none", _make(3, (30, 99), 128), {"window_size": (500, 128)}),
        Case("softcap", "scores are bent", _make(3, (70, 33), 96), {"softcap": 2.0, **_CAUSAL}),
        Case("slopes", "ALiBi", _make(3, (70, 33), 96, slopes=1), _CAUSAL),
        Case("slopes of each", "each sequence has its own", _make(3, (70, 33), 96, slopes=2)),
        Case("softcap and slopes", "in this order", _make(3, (70, 33), 96, slopes=2), {"softcap": 2.0}),
        Case("sinks", "one more key of value 0", _make(3, (70, 0), 96, sinks=True), _CAUSAL),
        Case("scale", "the scale is not the default", _make(3, (70, 33), 96), {"softmax_scale": 0.4}),
        Case("rotary", "queries stand one after the other", _make(3, (70, 33), 96, rotary_dim=32), _CAUSAL),
        Case("rotary, no mask", "queries all stand at the end", _make(3, (70, 33), 96, rotary_dim=16)),
        Case(
            "rotary, interleaved",
            "the other pairing, in a window",
            _make(3, (70, 33), 96, rotary_dim=16),
            {"window_size": (20, 5), "rotary_interleaved": True},
        ),
        Case("head dimension 8", "smaller than a tile may be", _make(3, (40, 9), 64, (2, 1), 8), _CAUSAL),
        Case("head dimension 59", "no power of two: columns are masked", _make(1, (40, 9), 64, (2, 1), 59), _CAUSAL),
        Case("head dimension 128", "Qwen3", _make(1, (40, 9), 64, (8, 1), 128), _CAUSAL),
        Case("head dimension 256", "the largest", _make(1, (40, 9), 64, (2, 1), 256), _CAUSAL),
        Case("heads first", "caches are views of [B, H, S, D]", _make(1, (70, 33), 96, layout="heads first"), _CAUSAL),
        Case("joined", "caches are halves of one tensor", _make(1, (70, 33), 96, page=16, layout="joined"), _CAUSAL),
        Case("two splits", "parts are added up", _make(1, (70, 33), 96), _CAUSAL | _TWO),
        Case("five splits", "more parts than a sequence has blocks", _make(3, (70, 9, 0), 96), _CAUSAL | _FIVE),
        Case("splits, paged", "a part begins inside a page", _make(3, (170, 33), 192, page=96), _CAUSAL | _FIVE),
        Case("splits, window", "parts of what is seen", _make(3, (170, 33), 192), {"window_size": (70, 9), **_TWO}),
        Case("splits, chunk", "many rows", _make(9, (170, 33), 192), _CAUSAL | _TWO),
        Case("splits, sinks", "a sink joins once", _make(3, (70, 0), 96, sinks=True), _CAUSAL | _FIVE),
        Case("many splits", "more than are added at a time", _make(1, (700, 9), 704, (1, 1), 16), {"num_splits": 20}),
        Case("packed", "sequences of length 0 and 1 too", _make((33, 0, 1, 9), (70, 5, 40, 9), 96, page=16), _CAUSAL),
        Case("packed, contiguous", "the cache is not in pages", _make((33, 0, 1, 9), (70, 5, 40, 9), 96)),
        Case(
            "packed, longest given",
            "all decode",
            _make((1, 1, 1), (70, 5, 40), 96, page=16),
            {"max_seqlen_q": 1, **_CAUSAL},
        ),
        Case("packed, splits", "parts of packed queries", _make((3, 0, 1), (70, 5, 90), 96), _CAUSAL | _TWO),
        Case(
            "packed, spare queries",
            "queries of no sequence give 0",
            _make((9, 3), (70, 5), 96, spare=7, sinks=True, slopes=2, rotary_dim=32),
            _CAUSAL,
        ),
        Case("packed, none", "no sequence at all", _make((), (), 64, spare=5)),
        Case("Qwen3-30B-A3B", "a decoding step", _make(1, (4096, 700) * 8, 4096, (32, 4), 128, page=64), _CAUSAL, True),
        Case(
            "long",
            "many splits of a long cache",
            _make(1, (32000, 17), 32768, (32, 4), 128, page=16),
            _CAUSAL,
            gpu_only=True,
        ),
        Case("long chunk", "a chunk of a prefill", _make(512, (3000, 512), 4096, (16, 2), 128), _CAUSAL, True),
        Case("long chunk, 64", "the same, D 64", _make(512, (3000, 512), 4096, (8, 2), 64, page=64), _CAUSAL, True),
        Case("long chunk, 256", "the same, D 256", _make(512, (3000, 512), 4096, (8, 2), 256), _CAUSAL, True),
        Case("long, 64", "decoding, D 64", _make(1, (9000, 512), 16384, (8, 2), 64), _CAUSAL, True),
        Case("long, 256", "decoding, D 256", _make(1, (9000, 512), 16384, (8, 2), 256, page=256), _CAUSAL, True),
    ),
)
