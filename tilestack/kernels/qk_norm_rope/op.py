"""Normalisation of every query and key head, then rotary position embedding: the contract.

    n = x / sqrt(mean(x^2) + eps) * weight          over one head of D numbers
    out = n * cos + rotate_half(n) * sin,           rotate_half([a, b]) = [-b, a], a and b the halves of the head

Sources: Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019), eq. 4; Su et al., "RoFormer" (2021), eq. 34,
in the half-split convention of transformers; both as in Qwen3 (Qwen3MoeRMSNorm, then apply_rotary_pos_emb).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tilestack.kernels import checks
from tilestack.kernels.dispatch import Op, portable, reference
from tilestack.kernels.registration import Contract


@dataclass(frozen=True)
class QKNormRopeParams:
    eps: float


def _fake(q, k, q_weight, k_weight, cos, sin, params: QKNormRopeParams) -> tuple[torch.Tensor, torch.Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


CONTRACT = Contract(
    "qk_norm_rope",
    ("q", "k", "q_weight", "k_weight", "cos", "sin"),
    ("q_out", "k_out"),
    QKNormRopeParams,
    _fake,
)
OP = Op(CONTRACT, (portable("qk_norm_rope"), reference("qk_norm_rope")))


def qk_norm_rope(
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    eps: float = 1e-6,
    implementation: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalise every head of q and k, then rotate it to its position.

    q: [B, S, Hq, D], floating point, D even, any strides (a slice of a fused projection is read in place).
    k: [B, S, Hk, D], the dtype of q. Packed documents are B = 1: positions are in cos and sin alone.
    q_weight, k_weight: [D], the dtype of q.
    cos, sin: [B or 1, S, D], both float32 or both q's dtype. No gradient flows to them.
    implementation: "tilestack-triton" or "reference"; None chooses.

    Returns `(q_out, k_out)` like q and k, contiguous. Differentiable in q, k, q_weight and k_weight.
    Raises ValueError for wrong shapes, dtypes or devices.
    """
    _check(q, k, q_weight, k_weight, cos, sin)
    checks.at_least("qk_norm_rope", "eps", eps, 0)
    return OP((q, k, q_weight, k_weight, cos.detach(), sin.detach()), QKNormRopeParams(eps), implementation)


def _check(q, k, q_weight, k_weight, cos, sin) -> None:
    op = "qk_norm_rope"
    checks.rank(op, "q", q, (4,), "[B, S, Hq, D]")
    checks.rank(op, "k", k, (4,), "[B, S, Hk, D]")
    checks.floating(op, q=q)
    checks.same_dtype(op, q=q, k=k, q_weight=q_weight, k_weight=k_weight)
    checks.same_device(op, q=q, k=k, q_weight=q_weight, k_weight=k_weight, cos=cos, sin=sin)
    batch, seqlen, q_heads, head_dim = q.shape
    checks.at_least(op, "Hq, the heads of q,", q_heads, 1)
    checks.at_least(op, "Hk, the heads of k,", k.shape[2], 1)
    if head_dim % 2 or head_dim == 0:
        raise ValueError(f"{op}: D, the last dimension of q, must be even and positive, got {head_dim}")
    checks.shape(op, "k", k, (batch, seqlen, k.shape[2], head_dim), "[B, S, Hk, D], all but Hk as in q")
    checks.shape(op, "q_weight", q_weight, (head_dim,), "[D]")
    checks.shape(op, "k_weight", k_weight, (head_dim,), "[D]")
    if tuple(cos.shape) not in {(1, seqlen, head_dim), (batch, seqlen, head_dim)}:
        raise ValueError(f"{op}: cos must be [B or 1, S, D] = [{batch} or 1, {seqlen}, {head_dim}], got {[*cos.shape]}")
    checks.shape(op, "sin", sin, tuple(cos.shape), "the shape of cos")
    if cos.dtype not in (torch.float32, q.dtype):
        raise ValueError(f"{op}: cos must be torch.float32 or q's dtype ({q.dtype}), got {cos.dtype}")
    checks.same_dtype(op, cos=cos, sin=sin)
