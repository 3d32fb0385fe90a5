"""What `tilestack bench attention` runs: shapes, their arithmetic, their inputs."""

from __future__ import annotations

import itertools
import math
from dataclasses import asdict, dataclass

import torch

TOKENS = 16384
MEAN_LENGTH = 1024
LENGTHS = (1024, 2048, 4096, 8192, 16384)


@dataclass(frozen=True)
class AttentionCase:
    """One shape. seqlen: tokens of a sequence, of all documents together where layout is "packed" (then batch is 1).

    lengths: of the documents, packed only. window: (left, right) of a query's own key, -1 is no limit; one with a left
    limit is causal.
    """

    batch: int
    seqlen: int
    heads: int = 32
    kv_heads: int = 4
    head_dim: int = 128
    causal: bool = True
    window: tuple[int, int] = (-1, -1)
    deterministic: bool = False
    layout: str = "dense"
    lengths: tuple[int, ...] | None = None
    dtype: str = "bfloat16"

    def as_dict(self) -> dict:
        """The case as a result file has it: tuples are lists there."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @property
    def sequences(self) -> tuple[int, ...]:
        """The length of every sequence."""
        return self.lengths if self.lengths is not None else (self.seqlen,) * self.batch

    def flops(self, direction: str) -> float:
        """4 * Hq * S^2 * D of every sequence, half of it where causal; a backward is 2.5 forwards, "both" 3.5.

        Of a causal window what lies left of it is not counted either.
        """
        pairs = sum(map(self._pairs, self.sequences))
        return 4 * self.heads * self.head_dim * pairs * {"forward": 1.0, "backward": 2.5, "both": 3.5}[direction]

    def _pairs(self, length: int) -> float:
        if not self.causal:
            return float(length**2)
        left_out = max(0, length - self.window[0] - 1) if self.window[0] >= 0 else 0
        return 0.5 * (length**2 - left_out**2)


def document_lengths(total: int, mean: int = MEAN_LENGTH, sigma: float = 1.0, seed: int = 0) -> tuple[int, ...]:
    """Log-normal lengths that sum to `total`; the last document is cut to fit."""
    generator = torch.Generator().manual_seed(seed)
    lengths, left = [], total
    while left:
        normal = torch.randn((), generator=generator).item()
        length = max(1, min(left, round(math.exp(math.log(mean) - sigma**2 / 2 + sigma * normal))))
        lengths.append(length)
        left -= length
    return tuple(lengths)


def packed(total: int) -> AttentionCase:
    """Documents of log-normal lengths, one after the other."""
    return AttentionCase(1, total, layout="packed", lengths=document_lengths(total))


TINY = AttentionCase(1, 128)  # the GPU is done at once: what a call costs the host
COLD = AttentionCase(4, 4096)  # the first call


def cases(quick: bool = False) -> list[AttentionCase]:
    """Every shape, the most important ones first; with `quick` a few."""
    if quick:
        return [AttentionCase(TOKENS // s, s) for s in (1024, 4096, 16384)] + [packed(TOKENS)]
    variants = (
        {},
        {"kv_heads": 16, "heads": 16},
        {"kv_heads": 32, "head_dim": 64},
        {"causal": False},
    )
    dense = [AttentionCase(TOKENS // s, s, **variant) for variant in variants for s in LENGTHS]
    repeatable = [AttentionCase(TOKENS // s, s, deterministic=True) for s in (4096, 16384)]
    windows = [AttentionCase(TOKENS // s, s, window=(1023, 0)) for s in (4096, 16384)]
    wide = [AttentionCase(TOKENS // s, s, heads=16, kv_heads=4, head_dim=256) for s in (4096, 16384)]
    return [
        *dense[: len(LENGTHS)],
        packed(TOKENS),
        packed(4 * TOKENS),
        *repeatable,
        *wide,
        *windows,
        *dense[len(LENGTHS) :],
    ]


def make(case: AttentionCase, device: str, seed: int = 0) -> dict[str, torch.Tensor | None]:
    """q, k, v, dout [B, S, H, D] (packed [T, H, D]) and cu_seqlens (None where dense); q, k and v want gradients."""
    generator = torch.Generator(device).manual_seed(seed)
    rows = (case.seqlen,) if case.lengths else (case.batch, case.seqlen)

    def random(heads: int) -> torch.Tensor:
        shape = (*rows, heads, case.head_dim)
        return torch.randn(shape, generator=generator, device=device, dtype=getattr(torch, case.dtype))

    tensors = {name: random(heads).requires_grad_() for name, heads in (("q", case.heads), ("k", case.kv_heads))}
    tensors["v"], tensors["dout"] = random(case.kv_heads).requires_grad_(), random(case.heads)
    offsets = [0, *itertools.accumulate(case.lengths)] if case.lengths else None
    tensors["cu_seqlens"] = torch.tensor(offsets, dtype=torch.int32, device=device) if offsets else None
    return tensors
