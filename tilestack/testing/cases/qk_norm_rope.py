"""Cases of qk_norm_rope."""

from __future__ import annotations

import torch

from tilestack.kernels import qk_norm_rope
from tilestack.testing.compare import Case, OpCases


def _tables(batch: int, seqlen: int, head_dim: int, first_positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of RoFormer, eq. 15, as transformers makes them: [batch, seqlen, head_dim], float32."""
    frequencies = 10000.0 ** -(torch.arange(0, head_dim, 2) / head_dim)
    positions = first_positions[:batch, None] + torch.arange(seqlen)
    angles = positions[..., None] * frequencies
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def _make(
    batch: int,
    seqlen: int,
    heads: tuple[int, int],
    head_dim: int,
    *,
    layout: str = "plain",
    positions_per_row: bool = False,
    float32_tables: bool = False,
    halves_differ: bool = False,
    scale: float = 1.0,
):
    """layout: "plain"; "fused" (q and k are slices of one projection); "heads first" (views of [B, H, S, D])."""

    def make(dtype, device, generator):
        def random(*size):
            return (scale * torch.randn(*size, generator=generator)).to(device, dtype)

        q_heads, k_heads = heads
        if layout == "fused":
            fused = random(batch, seqlen, q_heads + 2 * k_heads, head_dim)
            q, k = fused[:, :, :q_heads], fused[:, :, q_heads : q_heads + k_heads]
        elif layout == "heads first":
            q = random(batch, q_heads, seqlen, head_dim).transpose(1, 2)
            k = random(batch, k_heads, seqlen, head_dim).transpose(1, 2)
        else:
            q, k = random(batch, seqlen, q_heads, head_dim), random(batch, seqlen, k_heads, head_dim)
        first = torch.arange(batch) * 7 if positions_per_row else torch.zeros(1, dtype=torch.int64)
        cos, sin = _tables(batch if positions_per_row else 1, seqlen, head_dim, first)
        if halves_differ:
            cos, sin = (torch.randn(cos.shape, generator=generator) for _ in range(2))
        table_dtype = torch.float32 if float32_tables else dtype
        return {
            "q": q,
            "k": k,
            "q_weight": 1 + random(head_dim),
            "k_weight": 1 + random(head_dim),
            "cos": cos.to(device, table_dtype),
            "sin": sin.to(device, table_dtype),
        }

    return make


def _call(tensors, arguments, implementation):
    result = qk_norm_rope(**tensors, **arguments, implementation=implementation)
    return dict(zip(("q_out", "k_out"), result, strict=True))


CASES = OpCases(
    op="qk_norm_rope",
    call=_call,
    differentiable=("q", "k", "q_weight", "k_weight"),
    cases=(
        Case("grouped heads", "more query heads than key heads", _make(2, 5, (4, 2), 16)),
        Case("fused projection", "q and k are strided slices of one tensor", _make(2, 5, (4, 1), 16, layout="fused")),
        Case("heads first", "the head's stride is the largest", _make(2, 5, (3, 2), 16, layout="heads first")),
        Case("positions per row", "cos and sin have a batch", _make(2, 5, (4, 2), 16, positions_per_row=True)),
        Case("float32 tables", "cos and sin are wider than q", _make(1, 9, (2, 1), 16, float32_tables=True)),
        Case(
            "halves differ", "cos and sin do not repeat in the second half", _make(1, 4, (2, 1), 16, halves_differ=True)
        ),
        Case("head 20", "half a head is no power of two, so loads are masked", _make(1, 7, (3, 2), 20)),
        Case("head 2", "the smallest head", _make(1, 3, (2, 1), 2)),
        Case("head 256", "the largest head", _make(1, 3, (2, 1), 256)),
        Case("one row", "fewer rows than a block", _make(1, 1, (1, 1), 64)),
        Case("tiny values", "eps is not negligible", _make(1, 4, (2, 2), 16, scale=1e-3)),
        Case("no tokens", "an empty batch", _make(0, 5, (4, 2), 16)),
        Case("Qwen3-30B-A3B", "the real shape", _make(2, 2048, (32, 4), 128), gpu_only=True),
        Case(
            "Qwen3-30B-A3B fused",
            "the real shape, strided",
            _make(1, 4096, (32, 4), 128, layout="fused"),
            gpu_only=True,
        ),
    ),
)
