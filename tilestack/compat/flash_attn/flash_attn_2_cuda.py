"""The functions of flash-attn's compiled part, which flash_attn_interface calls `flash_attn_gpu`; positional as there.

No gradient flows through them. `gen` is a torch.Generator for the dropout. Where flash-attn is given tensors to write
into (out, dq, dk, dv; any strides), the result is computed and copied there.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  (torch's own habit)

from tilestack.compat.flash_attn import attend
from tilestack.compat.flash_attn.errors import check
from tilestack.compat.flash_attn.paged_keys import gather_keys
from tilestack.kernels import attention_backward, attention_kvcache, kv_cache_append
from tilestack.kernels.attention.dropout import draw_seed

__all__ = ["bwd", "fwd", "fwd_kvcache", "varlen_bwd", "varlen_fwd"]


@torch.no_grad()
def fwd(
    q, k, v, out_, alibi_slopes_, p_dropout, softmax_scale, is_causal, window_size_left, window_size_right, softcap,
    return_softmax, gen_=None,
) -> list[torch.Tensor]:  # fmt: skip
    """[out, softmax_lse, S_dmask, rng_state] of dense input."""
    asked = attend.options(
        q, k, v, dropout_p=p_dropout, softmax_scale=softmax_scale, causal=is_causal,
        window_size=(window_size_left, window_size_right), softcap=softcap, alibi_slopes=alibi_slopes_,
    )  # fmt: skip
    return _forward(q, k, v, out_, asked, return_softmax, gen_)


@torch.no_grad()
def varlen_fwd(
    q, k, v, out_, cu_seqlens_q, cu_seqlens_k, seqused_k_, leftpad_k_, block_table_, alibi_slopes_, max_seqlen_q,
    max_seqlen_k, p_dropout, softmax_scale, zero_tensors, is_causal, window_size_left, window_size_right, softcap,
    return_softmax, gen_=None,
) -> list[torch.Tensor]:  # fmt: skip
    """[out, softmax_lse, S_dmask, rng_state] of packed input. Rows of no sequence are 0 with any zero_tensors."""
    if block_table_ is not None or leftpad_k_ is not None or seqused_k_ is not None:
        k, v, cu_seqlens_k = gather_keys(k, v, cu_seqlens_k, max_seqlen_k, block_table_, leftpad_k_, seqused_k_)
    asked = attend.options(
        q, k, v, dropout_p=p_dropout, softmax_scale=softmax_scale, causal=is_causal,
        window_size=(window_size_left, window_size_right), softcap=softcap, alibi_slopes=alibi_slopes_,
        cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k,
    )  # fmt: skip
    return _forward(q, k, v, out_, asked, return_softmax, gen_)


@torch.no_grad()
def bwd(
    dout, q, k, v, out, softmax_lse, dq_, dk_, dv_, alibi_slopes_, p_dropout, softmax_scale, is_causal,
    window_size_left, window_size_right, softcap, deterministic, gen_=None, rng_state=None,
) -> list[torch.Tensor]:  # fmt: skip
    """[dq, dk, dv, softmax_d] of dense input; softmax_d = rowsum(out * dout), its rows rounded up to 128.

    out and softmax_lse may be those of a larger set of keys of which k and v are a part, as in ring attention.
    """
    asked = attend.options(
        q, k, v, dropout_p=p_dropout, softmax_scale=softmax_scale, causal=is_causal,
        window_size=(window_size_left, window_size_right), softcap=softcap, alibi_slopes=alibi_slopes_,
        deterministic=deterministic,
    )  # fmt: skip
    gradients = _backward(dout, q, k, v, out, softmax_lse, (dq_, dk_, dv_), asked, rng_state)
    return [*gradients, _softmax_d(dout, out, -q.shape[1] % 128)]


@torch.no_grad()
def varlen_bwd(
    dout, q, k, v, out, softmax_lse, dq_, dk_, dv_, cu_seqlens_q, cu_seqlens_k, alibi_slopes_, max_seqlen_q,
    max_seqlen_k, p_dropout, softmax_scale, zero_tensors, is_causal, window_size_left, window_size_right, softcap,
    deterministic, gen_=None, rng_state=None,
) -> list[torch.Tensor]:  # fmt: skip
    """[dq, dk, dv, softmax_d] of packed input; the first total_q columns of softmax_d are rowsum(out * dout)."""
    asked = attend.options(
        q, k, v, dropout_p=p_dropout, softmax_scale=softmax_scale, causal=is_causal,
        window_size=(window_size_left, window_size_right), softcap=softcap, alibi_slopes=alibi_slopes_,
        deterministic=deterministic,
        cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k,
    )  # fmt: skip
    gradients = _backward(dout, q, k, v, out, softmax_lse, (dq_, dk_, dv_), asked, rng_state)
    return [*gradients, _softmax_d(dout, out, 128 * (cu_seqlens_q.numel() - 1))]


def fwd_kvcache(
    q, kcache, vcache, k_, v_, seqlens_k_, rotary_cos_, rotary_sin_, cache_batch_idx_, leftpad_k_, block_table_,
    alibi_slopes_, out_, softmax_scale, is_causal, window_size_left, window_size_right, softcap,
    is_rotary_interleaved, num_splits,
) -> list[torch.Tensor]:  # fmt: skip
    """[out, softmax_lse]; k_ and v_ are written into the caches first."""
    _check_cache(q, kcache, k_, v_, seqlens_k_, rotary_cos_, leftpad_k_, cache_batch_idx_, block_table_)
    window_size = attend.window((window_size_left, window_size_right), _capacity(kcache, block_table_))
    shared = {
        "cache_seqlens": seqlens_k_,
        "block_table": block_table_,
        "cache_batch_idx": cache_batch_idx_,
        "rotary_cos": rotary_cos_,
        "rotary_sin": rotary_sin_,
        "rotary_interleaved": is_rotary_interleaved,
    }
    if k_ is not None:
        kv_cache_append(kcache, vcache, k_, v_, **shared)
    out, lse = attention_kvcache(
        q, kcache, vcache, **shared, new_keys=0 if k_ is None else k_.shape[1], cache_leftpad=leftpad_k_,
        softmax_scale=softmax_scale, causal=bool(is_causal), window_size=window_size, softcap=max(float(softcap), 0.0),
        alibi_slopes=alibi_slopes_, num_splits=num_splits, return_lse=True,
    )  # fmt: skip
    return [out if out_ is None else out_.copy_(out), attend.lse_to_flash_attn(lse)]


def _capacity(cache: torch.Tensor, block_table: torch.Tensor | None) -> int:
    """Keys that the cache can have of one sequence."""
    return cache.shape[1] if block_table is None else cache.shape[1] * block_table.shape[1]


def _check_cache(q, cache, k, v, seqlens, rotary_cos, leftpad, batch_idx, block_table) -> None:
    """What flash-attn asks beyond what tilestack's two ops ask."""
    check(q.dim() == 4, "q", "[batch, seqlen, heads, head_dim]", list(q.shape))
    check(q.dtype in (torch.float16, torch.bfloat16), "q", "float16 or bfloat16", q.dtype)
    check(q.shape[-1] <= attend.MAX_HEAD_DIM, "the head dimension", f"at most {attend.MAX_HEAD_DIM}", q.shape[-1])
    check((k is None) == (v is None), "v", "given where k is, and only there", None if v is None else list(v.shape))
    check(k is None or seqlens is not None, "cache_seqlens", "given where k is", seqlens)
    check(k is not None or rotary_cos is None, "rotary_cos", "None where k is", "a tensor")
    if block_table is not None:
        check(cache.shape[1] % 256 == 0, "the page size", "a multiple of 256", cache.shape[1])
        check(leftpad is None and batch_idx is None, "cache_leftpad and cache_batch_idx", "None with pages", "a tensor")


def _forward(q, k, v, out_, asked: dict[str, Any], return_softmax, gen_) -> list[torch.Tensor]:
    has_dropout = asked["dropout_p"] > 0
    check(has_dropout or not return_softmax, "return_softmax", "False where there is no dropout", return_softmax)
    rng_state = draw_seed(q.device, gen_) if has_dropout else None
    out, lse, probabilities = attend.attend_with_probabilities(q, k, v, asked, rng_state, return_softmax)
    if rng_state is None:
        rng_state = torch.zeros(2, dtype=torch.int64, device=q.device)
    return [out if out_ is None else out_.copy_(out), lse, probabilities, rng_state]


def _backward(dout, q, k, v, out, lse, targets, asked: dict[str, Any], rng_state) -> list[torch.Tensor]:
    check(asked["dropout_p"] == 0 or rng_state is not None, "rng_state", "that of the forward pass", rng_state)
    padded = [attend.pad_head_dim(each) for each in (dout, q, k, v, out)]
    gradients = attention_backward(*padded, attend.lse_from_flash_attn(lse), **asked, dropout_seed=rng_state)
    gradients = [each[..., : q.shape[-1]] for each in gradients]
    return [each if target is None else target.copy_(each) for each, target in zip(gradients, targets, strict=True)]


def _softmax_d(dout: torch.Tensor, out: torch.Tensor, more: int) -> torch.Tensor:
    """[B, H, Sq + more], or packed [H, total_q + more], float32."""
    return F.pad((dout.float() * out.float()).sum(-1).transpose(-1, -2), (0, more)).contiguous()
