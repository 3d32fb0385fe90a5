"""Write new keys and values behind those that a cache holds, the keys rotated to their positions: the contract.

    k_cache[place(b, p)] = rotary(k[b, i], p)
    v_cache[place(b, p)] = v[b, i]                  p = cache_seqlens[b] + i

Sources: Su et al., "RoFormer" (2021), eq. 34; Kwon et al., "PagedAttention" (2023), section 4.1; names and semantics:
flash_attn_with_kvcache of flash-attn 2.8.3.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tilestack.kernels import checks
from tilestack.kernels.dispatch import Op, portable, reference
from tilestack.kernels.kv_cache_append.cache import capacity, check_cache, check_places, check_rotary
from tilestack.kernels.registration import InPlaceContract


@dataclass(frozen=True)
class KVCacheAppendParams:
    rotary_interleaved: bool


CONTRACT = InPlaceContract(
    "kv_cache_append",
    ("k_cache", "v_cache", "k", "v", "cache_seqlens", "block_table?", "cache_batch_idx?", "rotary_cos?", "rotary_sin?"),
    ("k_cache", "v_cache"),
    KVCacheAppendParams,
)
OP = Op(CONTRACT, (portable("kv_cache_append"), reference("kv_cache_append")))


@torch.no_grad()
def kv_cache_append(
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    cache_seqlens: torch.Tensor,
    block_table: torch.Tensor | None = None,
    cache_batch_idx: torch.Tensor | None = None,
    rotary_cos: torch.Tensor | None = None,
    rotary_sin: torch.Tensor | None = None,
    rotary_interleaved: bool = False,
    implementation: str | None = None,
) -> None:
    """Write k and v into the caches at positions cache_seqlens[b] + i, in place. No gradient.

    k_cache, v_cache: [B_cache, S_cache, Hkv, D], floating point; or paged [n_pages, page, Hkv, D], any page size.
    k, v: [B, S_new, Hkv, D], the dtype of the cache, any strides. v arrives bit for bit.
    cache_seqlens: [B] int32: how many positions of each sequence are taken. It is not changed. Rows that would land
        before position 0 or past the cache's end are not written.
    block_table: [B, max_pages] int32: the pages of each sequence; the caches are paged.
    cache_batch_idx: [B] int32: the caches' row of each sequence, each once; None is the b-th. Not with block_table.
    rotary_cos, rotary_sin: [S_ro, R / 2], float32 or the cache's dtype, S_ro at least the capacity of a sequence:
        rotate the first R columns of k to the position they land on; in float32, rounded once.
    rotary_interleaved: pairs of columns are (2i, 2i + 1), else (i, i + R / 2).
    implementation: "tilestack-triton" or "reference"; None chooses.

    Values of integer tensors are never read on the host, so they are not checked.
    Raises ValueError for wrong shapes, dtypes or devices; then nothing was written.
    """
    op = "kv_cache_append"
    check_cache(op, k_cache, v_cache)
    checks.rank(op, "k", k, (4,), "[B, S_new, Hkv, D]")
    checks.shape(op, "k", k, (*k.shape[:2], *k_cache.shape[2:]), "[B, S_new, Hkv, D], heads as in k_cache")
    checks.shape(op, "v", v, tuple(k.shape), "the shape of k")
    checks.same_dtype(op, k_cache=k_cache, k=k, v=v)
    checks.same_device(op, k_cache=k_cache, v_cache=v_cache, k=k, v=v)
    check_places(op, k_cache, k.shape[0], block_table, cache_batch_idx, {"cache_seqlens": cache_seqlens})
    check_rotary(op, k_cache, capacity(k_cache, block_table), rotary_cos, rotary_sin)
    tensors = (k_cache, v_cache, k, v, cache_seqlens, block_table, cache_batch_idx, rotary_cos, rotary_sin)
    OP(tensors, KVCacheAppendParams(bool(rotary_interleaved)), implementation)
