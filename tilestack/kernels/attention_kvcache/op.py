"""Attention of new queries over a cache of keys and values, for decoding and chunked prefill: the contract.

    s[i, j] = cap(softmax_scale * q[i] . k[j]) - slope * |i + Sk - Sq - j|    where query i may see key j, else -inf
    lse[i] = log(sum_j exp(s[i, j]) + exp(sink[h]))             the last term if there are sinks
    out[i] = sum_j exp(s[i, j] - lse[i]) * v[j]             cap(x) = softcap * tanh(x / softcap)

over the keys of one sequence, which the cache holds in a row or in pages: `attention`, read from a cache. Sources:
Vaswani et al. (2017), eq. 1; paged caches: Kwon et al., "PagedAttention" (2023); names and semantics:
flash_attn_with_kvcache of flash-attn 2.8.3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from tilestack.kernels import checks
from tilestack.kernels.attention.layout import empty_lse
from tilestack.kernels.dispatch import Op, portable, reference
from tilestack.kernels.kv_cache_append.cache import capacity, check_cache, check_places, check_rotary
from tilestack.kernels.registration import Contract

OP_NAME = "attention_kvcache"
MAX_SPLITS = 128


@dataclass(frozen=True)
class KVCacheAttentionParams:
    """What is no tensor, normalised.

    window_left, window_right: keys seen to the left and right of the query's own position; -1 is no limit; causal is
        window_right == 0. Limits that no sequence of the cache can reach are -1.
    softcap: 0 is none.
    new_keys: keys that were appended behind cache_seqlens.
    max_seqlen_q: packed queries' longest sequence; -1 is unknown (and in dense input).
    num_splits: 0 leaves it to the implementation.
    """

    softmax_scale: float
    window_left: int
    window_right: int
    softcap: float
    new_keys: int
    max_seqlen_q: int
    rotary_interleaved: bool
    num_splits: int


def _fake(q, *_) -> tuple[torch.Tensor, torch.Tensor]:
    return q.new_empty(q.shape), empty_lse(q)


CONTRACT = Contract(
    OP_NAME,
    (
        "q", "k_cache", "v_cache", "cache_seqlens?", "block_table?", "cache_batch_idx?", "cache_leftpad?",
        "cu_seqlens_q?", "sinks?", "alibi_slopes?", "rotary_cos?", "rotary_sin?",
    ),
    ("out", "lse"),
    KVCacheAttentionParams,
    _fake,
    constants=("out", "lse"),
)  # fmt: skip
OP = Op(CONTRACT, (portable(OP_NAME), reference(OP_NAME)))


@torch.no_grad()
def attention_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    *,
    cache_seqlens: torch.Tensor | None = None,
    new_keys: int = 0,
    block_table: torch.Tensor | None = None,
    cache_batch_idx: torch.Tensor | None = None,
    cache_leftpad: torch.Tensor | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    causal: bool = False,
    softmax_scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    rotary_cos: torch.Tensor | None = None,
    rotary_sin: torch.Tensor | None = None,
    rotary_interleaved: bool = False,
    num_splits: int = 0,
    return_lse: bool = False,
    implementation: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention of every query over the cached keys of its sequence. Forward only: no gradient.

    q: [B, Sq, Hq, D], floating point, any strides; or packed [Tq, Hq, D] with cu_seqlens_q.
    k_cache, v_cache: [B_cache, S_cache, Hkv, D], the dtype of q; or paged [n_pages, page, Hkv, D], any page size. Hq is
        a multiple of Hkv: query head h reads key head h // (Hq / Hkv). What lies behind a sequence's end is not read.
    cache_seqlens: [B] int32: a sequence's keys end at position cache_seqlens[b] + new_keys, at most at the cache's
        end; None: there.
    new_keys: how many keys kv_cache_append has written behind cache_seqlens (which need not be changed in between).
    block_table: [B, max_pages] int32: the pages of each sequence; the caches are paged.
    cache_batch_idx: [B] int32: the caches' row of each sequence; None is the b-th. Not with block_table.
    cache_leftpad: [B] int32: the position of each sequence's first key; None is 0. Not with block_table.
    cu_seqlens_q: [B + 1] int32: packed queries: where each sequence begins, then the end. Queries after the last offset
        belong to no sequence.
    max_seqlen_q: packed queries only: no sequence has more; None is unknown.
    causal, window_size, softmax_scale: as in `attention`, Sk being a sequence's keys: query i sees the keys j, counted
        from its first, with i + Sk - Sq - left <= j <= i + Sk - Sq + right; with causal, right is 0.
    softcap, sinks, alibi_slopes: as in `attention`; slopes are [Hq] or [B, Hq].
    rotary_cos, rotary_sin, rotary_interleaved: as in kv_cache_append: rotate the queries, too: each to position
        cache_seqlens[b] + i if causal or in a window, else all to cache_seqlens[b]. Rounded to q's dtype. Needs
        cache_seqlens.
    num_splits: into how many parts the keys of a sequence are cut, which run side by side; 0 chooses by shapes alone.
    return_lse: also return the log-sum-exp.
    implementation: "tilestack-triton" or "reference"; None chooses.

    Returns `out` like q, or `(out, lse)`: lse is [B, Hq, Sq] or [Hq, Tq], float32 (float64 for float64 input). A query
    that sees no key gives out = 0 and lse = -inf, or its head's sink. The same input gives the same bits. Values of
    integer tensors are never read on the host, so they are not checked.
    Raises ValueError for wrong shapes, dtypes, devices or numbers.
    """
    _check_tensors(q, k_cache, v_cache)
    batch = _check_packing(q, cu_seqlens_q, max_seqlen_q)
    per_sequence = {"cache_seqlens": cache_seqlens, "cache_leftpad": cache_leftpad}
    check_places(OP_NAME, k_cache, batch, block_table, cache_batch_idx, per_sequence)
    room = capacity(k_cache, block_table)
    check_rotary(OP_NAME, k_cache, room, rotary_cos, rotary_sin)
    _check_together(cache_seqlens, new_keys, block_table, cache_leftpad, rotary_cos)
    _check_by_head(q, sinks, alibi_slopes, batch)
    left, right = _window(window_size, causal, room)
    params = KVCacheAttentionParams(
        softmax_scale=_scale(softmax_scale, q.shape[-1]),
        window_left=left,
        window_right=right,
        softcap=_softcap(softcap),
        new_keys=new_keys,
        max_seqlen_q=-1 if max_seqlen_q is None else max_seqlen_q,
        rotary_interleaved=bool(rotary_interleaved),
        num_splits=_splits(num_splits),
    )
    tensors = (
        q, k_cache, v_cache, cache_seqlens, block_table, cache_batch_idx, cache_leftpad, cu_seqlens_q, sinks,
        alibi_slopes, rotary_cos, rotary_sin,
    )  # fmt: skip
    out, lse = OP(tensors, params, implementation)
    return (out, lse) if return_lse else out


def _check_tensors(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor) -> None:
    check_cache(OP_NAME, k_cache, v_cache)
    checks.rank(OP_NAME, "q", q, (3, 4), "[B, Sq, Hq, D], or packed [Tq, Hq, D]")
    checks.same_dtype(OP_NAME, k_cache=k_cache, q=q)
    checks.same_device(OP_NAME, k_cache=k_cache, v_cache=v_cache, q=q)
    heads, head_dim = q.shape[-2:]
    kv_heads = k_cache.shape[2]
    checks.shape(OP_NAME, "q", q, (*q.shape[:-1], k_cache.shape[3]), "the head dimension of k_cache")
    if heads % kv_heads:
        raise ValueError(f"{OP_NAME}: q must have a multiple of the heads of k_cache ({kv_heads}), got {heads}")


def _check_packing(q: torch.Tensor, cu_seqlens_q: torch.Tensor | None, max_seqlen_q: int | None) -> int:
    """Returns the number of sequences."""
    if q.dim() == 4:
        for name, value in (("cu_seqlens_q", cu_seqlens_q), ("max_seqlen_q", max_seqlen_q)):
            if value is not None:
                raise ValueError(f"{OP_NAME}: {name} belongs to packed q, [Tq, Hq, D], but q is {list(q.shape)}")
        return q.shape[0]
    if cu_seqlens_q is None:
        raise ValueError(f"{OP_NAME}: cu_seqlens_q is missing: packed q {list(q.shape)} needs it")
    checks.dtype(OP_NAME, "cu_seqlens_q", cu_seqlens_q, torch.int32)
    checks.same_device(OP_NAME, q=q, cu_seqlens_q=cu_seqlens_q)
    checks.rank(OP_NAME, "cu_seqlens_q", cu_seqlens_q, (1,), "[B + 1]")
    checks.at_least(OP_NAME, "the length of cu_seqlens_q", cu_seqlens_q.numel(), 1)
    if max_seqlen_q is not None:
        _check_integer("max_seqlen_q", max_seqlen_q, 0)
    return cu_seqlens_q.numel() - 1


def _check_together(cache_seqlens, new_keys, block_table, cache_leftpad, rotary_cos) -> None:
    _check_integer("new_keys", new_keys, 0)
    if cache_seqlens is None:
        for name, given in (("new_keys", new_keys > 0), ("rotary_cos", rotary_cos is not None)):
            if given:
                raise ValueError(f"{OP_NAME}: cache_seqlens is missing: {name} counts from it")
    if block_table is not None and cache_leftpad is not None:
        raise ValueError(
            f"{OP_NAME}: cache_leftpad must be None with block_table: let the table begin at the first key"
        )


def _check_by_head(q: torch.Tensor, sinks, alibi_slopes, batch: int) -> None:
    if sinks is not None:
        checks.floating(OP_NAME, sinks=sinks)
        checks.same_device(OP_NAME, q=q, sinks=sinks)
        checks.shape(OP_NAME, "sinks", sinks, (q.shape[-2],), "one for each head of q")
    if alibi_slopes is None:
        return
    checks.dtype(OP_NAME, "alibi_slopes", alibi_slopes, torch.promote_types(q.dtype, torch.float32))
    checks.same_device(OP_NAME, q=q, alibi_slopes=alibi_slopes)
    heads = q.shape[-2]
    if tuple(alibi_slopes.shape) not in {(heads,), (batch, heads)}:
        expected = f"[Hq] or [B, Hq] = [{heads}] or [{batch}, {heads}]"
        raise ValueError(f"{OP_NAME}: alibi_slopes must be {expected}, got {list(alibi_slopes.shape)}")


def _check_integer(name: str, value: object, low: int) -> None:
    if isinstance(value, (torch.Tensor, float, bool)):
        raise ValueError(f"{OP_NAME}: {name} must be an integer, got {type(value).__name__}")
    checks.at_least(OP_NAME, name, value, low)


def _window(window_size: tuple[int, int], causal: bool, room: int) -> tuple[int, int]:
    if not isinstance(window_size, (tuple, list)) or len(window_size) != 2:
        raise ValueError(f"{OP_NAME}: window_size must be two integers, (left, right), got {window_size!r}")
    for value in window_size:
        _check_integer("window_size", value, -1)
    left, right = (-1 if value >= room else value for value in window_size)
    return left, 0 if causal else right


def _scale(softmax_scale: float | None, head_dim: int) -> float:
    if softmax_scale is None:
        return head_dim**-0.5
    if isinstance(softmax_scale, torch.Tensor) or not 0 < softmax_scale < math.inf:
        raise ValueError(f"{OP_NAME}: softmax_scale must be a finite number greater than 0, got {softmax_scale!r}")
    return float(softmax_scale)


def _softcap(softcap: float) -> float:
    if isinstance(softcap, torch.Tensor) or not 0 <= softcap < math.inf:
        raise ValueError(f"{OP_NAME}: softcap must be a finite number, 0 (off) or more, got {softcap!r}")
    return float(softcap)


def _splits(num_splits: int) -> int:
    _check_integer("num_splits", num_splits, 0)
    if num_splits > MAX_SPLITS:
        raise ValueError(f"{OP_NAME}: num_splits must be at most {MAX_SPLITS}, got {num_splits}")
    return num_splits
