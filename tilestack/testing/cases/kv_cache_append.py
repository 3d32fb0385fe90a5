"""Cases of kv_cache_append: what both caches hold afterwards."""

from __future__ import annotations

import torch

from tilestack.kernels import kv_cache_append
from tilestack.testing.compare import Case, OpCases


def random(shape: tuple, dtype, device, generator) -> torch.Tensor:
    return torch.randn(shape, generator=generator).to(device, dtype)


def integers(values: tuple, device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def rotary_tables(rows: int, rotary_dim: int, dtype, device) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [rows, rotary_dim / 2]."""
    frequencies = 10000.0 ** (-torch.arange(0, rotary_dim, 2) / rotary_dim)
    angles = torch.arange(rows)[:, None] * frequencies
    return angles.cos().to(device, dtype), angles.sin().to(device, dtype)


def pages(batch: int, max_pages: int, device, generator) -> torch.Tensor:
    """A block_table of pages in no order."""
    return torch.randperm(batch * max_pages, generator=generator).view(batch, max_pages).to(device, torch.int32)


def _make(
    seqlens: tuple = (5, 0, 9), new: int = 3, room: int = 32, heads: int = 2, head_dim: int = 16, *, page: int = 0,
    rotary_dim: int = 0, table_dtype: torch.dtype | None = None, batch_idx: tuple | None = None, strided: bool = False,
):  # fmt: skip
    def make(dtype, device, generator):
        batch = len(seqlens)
        max_pages = -(-room // page) if page else 0
        leading = (batch * max_pages, page) if page else (batch if batch_idx is None else max(batch_idx) + 1, room)
        k_cache, v_cache = (random((*leading, heads, head_dim), dtype, device, generator) for _ in range(2))
        if strided:
            k, v = random((batch, heads, new, 2 * head_dim), dtype, device, generator).transpose(1, 2).chunk(2, -1)
        else:
            k, v = (random((batch, new, heads, head_dim), dtype, device, generator) for _ in range(2))
        cos, sin = rotary_tables(room + 3, rotary_dim, table_dtype or dtype, device) if rotary_dim else (None, None)
        return {
            "k_cache": k_cache, "v_cache": v_cache, "k": k, "v": v, "cache_seqlens": integers(seqlens, device),
            "block_table": pages(batch, max_pages, device, generator) if page else None,
            "cache_batch_idx": None if batch_idx is None else integers(batch_idx, device),
            "rotary_cos": cos, "rotary_sin": sin,
        }  # fmt: skip

    return make


def _call(tensors, arguments, implementation):
    written = tensors | {name: tensors[name].clone() for name in ("k_cache", "v_cache")}
    kv_cache_append(**written, **arguments, implementation=implementation)
    return {name: written[name] for name in ("k_cache", "v_cache")}


_INTERLEAVED = {"rotary_interleaved": True}

CASES = OpCases(
    op="kv_cache_append",
    call=_call,
    differentiable=(),
    cases=(
        Case("plain", "the common case", _make(rotary_dim=16)),
        Case("paged", "a block_table says where", _make(page=16, rotary_dim=16), _INTERLEAVED),
        Case("no rotary", "keys are copied bit for bit, too", _make()),
        Case("interleaved", "the other pairing", _make(rotary_dim=16), _INTERLEAVED),
        Case("part of the head", "columns behind the rotary ones stay", _make(rotary_dim=8)),
        Case("part, interleaved", "the other pairing", _make(rotary_dim=8), _INTERLEAVED),
        Case("float32 tables", "cos and sin are wider than k", _make(rotary_dim=16, table_dtype=torch.float32)),
        Case("batch rows", "sequences are elsewhere in the cache", _make(batch_idx=(4, 1, 2), rotary_dim=16)),
        Case("over a page's end", "rows of one call lie on two pages", _make((14, 30, 0), 5, 48, page=16)),
        Case("small pages", "many pages in one call", _make((3, 0), 17, 24, page=4, rotary_dim=16)),
        Case("full", "rows past the end are not written", _make((31, 32, 40), 3, 32)),
        Case("full pages", "nor past the last page", _make((31, 32, 40), 3, 32, page=16, rotary_dim=16)),
        Case("before the start", "a negative length writes only what lands in the cache", _make((-2, 0), 3)),
        Case("strided", "k and v are views", _make(rotary_dim=16, strided=True)),
        Case("odd head", "no power of two, one head", _make(heads=1, head_dim=59, rotary_dim=32)),
        Case("large head", "the largest", _make(heads=3, head_dim=256, rotary_dim=256)),
        Case("prefill", "many blocks a sequence", _make((0, 7), 150, 160, 4, 32, rotary_dim=32)),
        Case("nothing new", "no row to write", _make(new=0)),
        Case("no sequence", "an empty batch", _make((), 3, page=16)),
        Case(
            "Qwen3-30B-A3B",
            "a decoding step of 64 sequences",
            _make((1000,) * 64, 1, 1024, 4, 128, page=64, rotary_dim=128),
            gpu_only=True,
        ),
    ),
)
