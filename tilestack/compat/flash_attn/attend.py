"""flash-attn's arguments in tilestack's words: what all entry points of this package share.

flash-attn's results are bitwise repeatable but for dq, which is so where `deterministic` is asked for. So a call
that does not ask for it still asks tilestack for that of dk and dv, deterministic="keys".
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  (torch's own habit)

from tilestack.compat.flash_attn.errors import check
from tilestack.compat.flash_attn.probabilities import s_dmask
from tilestack.kernels import attention

MAX_HEAD_DIM = 256


def maybe_contiguous(x: torch.Tensor | None) -> torch.Tensor | None:
    """x, or a copy where its last dimension is not contiguous."""
    return x.contiguous() if x is not None and x.stride(-1) != 1 else x


def round_multiple(x: int, m: int) -> int:
    """x, rounded up to a multiple of m."""
    return (x + m - 1) // m * m


def pad_head_dim(x: torch.Tensor) -> torch.Tensor:
    """x with zeros behind its last dimension, up to a multiple of 8; its last stride is 1."""
    missing = -x.shape[-1] % 8
    return F.pad(x, (0, missing)) if missing else maybe_contiguous(x)


def options(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size: Any,
    softcap: float,
    alibi_slopes: torch.Tensor | None,
    deterministic: bool = False,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
) -> dict[str, Any]:
    """Check the arguments of a call, and translate them to those of `tilestack.kernels.attention`."""
    packed = cu_seqlens_q is not None
    _check_tensors(q, k, v, packed)
    _check_numbers(dropout_p, softcap)
    if packed:
        max_seqlen_q, max_seqlen_k = int(max_seqlen_q), int(max_seqlen_k)
        _check_offsets(q, cu_seqlens_q, cu_seqlens_k)
    if alibi_slopes is not None:
        _check_slopes(q, alibi_slopes, cu_seqlens_q.numel() - 1 if packed else q.shape[0])
    return {
        "softmax_scale": q.shape[-1] ** -0.5 if softmax_scale is None else float(softmax_scale),
        "causal": bool(causal),
        "window_size": window(window_size, max_seqlen_k if packed else k.shape[1]),
        "softcap": max(float(softcap), 0.0),
        "alibi_slopes": alibi_slopes,
        "dropout_p": float(dropout_p),
        "deterministic": True if deterministic else "keys",
        "cu_seqlens_q": cu_seqlens_q,
        "cu_seqlens_k": cu_seqlens_k,
        "max_seqlen_q": max_seqlen_q,
        "max_seqlen_k": max_seqlen_k,
    }


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, asked: dict[str, Any], rng_state: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse), out differentiable in q, k and v, lse as tilestack has it. asked: from `options`."""
    head_dim = q.shape[-1]
    q, k, v = (pad_head_dim(each) for each in (q, k, v))
    out, lse = attention(q, k, v, **asked, dropout_seed=rng_state, return_lse=True)
    return out if q.shape[-1] == head_dim else out[..., :head_dim], lse


def attend_with_probabilities(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    asked: dict[str, Any],
    rng_state: torch.Tensor | None,
    wanted: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(out, softmax_lse, S_dmask) as flash-attn has them; S_dmask is of shape [0] if it is not wanted."""
    out, lse = attend(q, k, v, asked, rng_state)
    probabilities = s_dmask(q.detach(), k.detach(), asked, rng_state) if wanted else q.new_empty(0)
    return out, lse_to_flash_attn(lse), probabilities


def lse_to_flash_attn(lse: torch.Tensor) -> torch.Tensor:
    """Of a query that sees no key, flash-attn says +inf, and tilestack -inf."""
    return lse.masked_fill(lse == -torch.inf, torch.inf)


def lse_from_flash_attn(lse: torch.Tensor) -> torch.Tensor:
    """The inverse of lse_to_flash_attn."""
    return lse.masked_fill(lse == torch.inf, -torch.inf)


def window(window_size: Any, length_k: int) -> tuple[int, int]:
    """(left, right): -1 is no limit, which is also what a limit means that no key lies beyond."""
    left, right = (int(each) for each in window_size)  # of a list, or of a tensor of two
    return tuple(each if 0 <= each < length_k else -1 for each in (left, right))


def _check_tensors(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packed: bool) -> None:
    rank, meaning = (3, "[total_q, heads, head_dim]") if packed else (4, "[batch, seqlen, heads, head_dim]")
    check(q.dim() == rank, "q", meaning, list(q.shape))
    check(q.dtype in (torch.float16, torch.bfloat16), "q", "float16 or bfloat16", q.dtype)
    for name, each in (("k", k), ("v", v)):
        check(each.dtype == q.dtype, name, f"of the dtype of q, {q.dtype}", each.dtype)
        check(each.device == q.device, name, f"on the device of q, {q.device}", each.device)
        check(each.dim() == rank, name, meaning, list(each.shape))
        check(each.shape[-1] == q.shape[-1], name, f"of the head dimension of q, {q.shape[-1]}", list(each.shape))
        check(packed or each.shape[0] == q.shape[0], name, f"of the batch size of q, {q.shape[0]}", list(each.shape))
    check(k.shape == v.shape, "v", f"of the shape of k, {list(k.shape)}", list(v.shape))
    check(1 <= q.shape[-1] <= MAX_HEAD_DIM, "the head dimension", f"from 1 to {MAX_HEAD_DIM}", q.shape[-1])
    heads, heads_k = q.shape[-2], k.shape[-2]
    check(heads_k > 0 and heads % heads_k == 0, "the heads of q", f"a multiple of those of k, {heads_k}", heads)


def _check_numbers(dropout_p: float, softcap: float) -> None:
    check(0 <= dropout_p < 1, "dropout_p", "at least 0 and less than 1", dropout_p)
    check(softcap <= 0 or dropout_p == 0, "softcap", "0 where there is dropout", softcap)


def _check_offsets(q: torch.Tensor, cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor) -> None:
    for name, each in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        check(each.dtype == torch.int32, name, "int32", each.dtype)
        check(each.device == q.device, name, f"on the device of q, {q.device}", each.device)
        check(each.dim() == 1 and len(each) == len(cu_seqlens_q) >= 1, name, "[batch + 1]", list(each.shape))


def _check_slopes(q: torch.Tensor, alibi_slopes: torch.Tensor, batch: int) -> None:
    heads = q.shape[-2]
    check(alibi_slopes.dtype == torch.float32, "alibi_slopes", "float32", alibi_slopes.dtype)
    check(alibi_slopes.device == q.device, "alibi_slopes", f"on the device of q, {q.device}", alibi_slopes.device)
    fits = tuple(alibi_slopes.shape) in ((heads,), (batch, heads))
    check(fits, "alibi_slopes", f"[{heads}] or [{batch}, {heads}]", list(alibi_slopes.shape))
