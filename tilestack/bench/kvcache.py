"""`tilestack bench kvcache`: a decoding step over a cache of keys and values, beside the rivals that can read one.

One query a sequence, so that reading the keys and values once is all there is to do: GB/s is over those bytes. The
rivals of a contiguous cache are cuDNN, with grouped heads, SDPA's flash kernel, given the heads of a group as queries
of their key head, and flash-attn-4, which also reads pages. SDPA has no lengths: there, every sequence fills its cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from tilestack.bench.ops import describe, problem_rows
from tilestack.bench.problems import Problem, Tensors, Variant
from tilestack.bench.results import FOLDER, Recorder
from tilestack.bench.timing import ceilings
from tilestack.kernels import attention_kvcache


@dataclass(frozen=True)
class DecodingCase:
    """page: 0 is a contiguous cache. ragged: lengths from 1/16 of `keys` up to it, else all are `keys`."""

    batch: int
    keys: int
    page: int = 0
    ragged: bool = False
    heads: int = 32
    kv_heads: int = 4
    head_dim: int = 128

    def lengths(self) -> list[int]:
        if not self.ragged:
            return [self.keys] * self.batch
        step = 15 * self.keys / 16 / max(1, self.batch - 1)
        return [int(self.keys / 16 + i * step) for i in range(self.batch)]

    def described(self) -> dict:
        where = f"pages of {self.page}" if self.page else "contiguous"
        keys = f"{self.keys // 16} to {self.keys}" if self.ragged else f"{self.keys}"
        named = f"{self.batch} x {keys} keys, {self.heads}/{self.kv_heads} heads of {self.head_dim}, {where}"
        return {
            "case": named, "batch": self.batch, "seqlen": self.keys, "heads": self.heads, "kv_heads": self.kv_heads,
            "head_dim": self.head_dim, "page": self.page, "dtype": "bfloat16",
        }  # fmt: skip


CASES = (
    *(DecodingCase(batch, keys) for batch, keys in ((1, 32768), (16, 4096), (64, 4096), (32, 8192), (16, 32768))),
    DecodingCase(64, 4096, kv_heads=8, head_dim=64),
    DecodingCase(32, 4096, heads=16, head_dim=256),
    *(DecodingCase(batch, keys, page) for batch, keys, page in ((16, 4096, 64), (64, 4096, 16), (32, 8192, 256))),
    DecodingCase(64, 8192, 64, ragged=True),
)


def _make(case: DecodingCase) -> Tensors:
    rows = (case.batch * case.keys // case.page, case.page) if case.page else (case.batch, case.keys)
    k, v = (torch.randn(*rows, case.kv_heads, case.head_dim, device="cuda").bfloat16() for _ in range(2))
    tensors = {
        "q": torch.randn(case.batch, 1, case.heads, case.head_dim, device="cuda").bfloat16(), "k_cache": k,
        "v_cache": v, "cache_seqlens": torch.tensor(case.lengths(), dtype=torch.int32, device="cuda"),
    }  # fmt: skip
    if case.page:
        tensors["block_table"] = torch.randperm(rows[0], device="cuda").view(case.batch, -1).int()
    return tensors


def _ours(implementation: str | None) -> Variant:
    return lambda t: (attention_kvcache(**t, causal=True, implementation=implementation),)


def _cudnn(t: Tensors) -> tuple[torch.Tensor, ...]:
    q, k, v = (t[name].transpose(1, 2) for name in ("q", "k_cache", "v_cache"))
    return (torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, False)[0].transpose(1, 2),)


def _sdpa_flash(t: Tensors) -> tuple[torch.Tensor, ...]:
    """The heads of a group as queries of their key head: it reads keys once for each query head otherwise."""
    k, v = (t[name].transpose(1, 2) for name in ("k_cache", "v_cache"))
    q = t["q"].view(k.shape[0], k.shape[1], -1, k.shape[3])
    return (torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0].reshape(t["q"].shape),)


def _flash_attn_4(case: DecodingCase) -> Variant:
    def run(t: Tensors) -> tuple[torch.Tensor, ...]:
        from flash_attn.cute import flash_attn_func, flash_attn_varlen_func

        if case.page:
            out = flash_attn_varlen_func(
                t["q"][:, 0], t["k_cache"], t["v_cache"], cu_seqlens_q=_one_query_each(case.batch),
                seqused_k=t["cache_seqlens"], page_table=t["block_table"], max_seqlen_q=1, max_seqlen_k=case.keys,
                causal=True,
            )  # fmt: skip
        else:
            out = flash_attn_func(t["q"], t["k_cache"], t["v_cache"], causal=True)
        return ((out[0] if isinstance(out, tuple) else out).view(t["q"].shape),)

    return run


def _one_query_each(batch: int) -> torch.Tensor:
    return torch.arange(batch + 1, dtype=torch.int32, device="cuda")


def problem(case: DecodingCase) -> Problem:
    """The case with all that can run it."""
    variants = {"reference": _ours("reference"), "tilestack-triton": _ours(None), "flash-attn-4": _flash_attn_4(case)}
    if not case.page:
        variants |= {"cudnn": _cudnn, "sdpa-flash": _sdpa_flash}
    moved = 2 * 2 * sum(case.lengths()) * case.kv_heads * case.head_dim
    return Problem("attention_kvcache", case.described(), lambda: _make(case), (), variants, bytes={"forward": moved})


def run(repeats: int = 20, folder: Path = FOLDER) -> Path:
    """Time every case, print as it goes, write the result file."""
    limits = ceilings()
    print(f"ceilings: {limits}", flush=True)
    recorder = Recorder("kvcache", limits, folder, describe)
    for case in CASES:
        for row in problem_rows(problem(case), repeats, untimed=("reference",)):
            recorder.add(row)
    return recorder.finish()
