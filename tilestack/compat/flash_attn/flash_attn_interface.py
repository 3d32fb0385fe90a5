"""flash_attn.flash_attn_interface: the seven public functions, and below them what other projects import.

Notation: B batch, Sq and Sk lengths, H query heads, Hk key heads (H a multiple of Hk), D head dimension, up to 256.
Tensors are float16 or bfloat16. These arguments mean the same everywhere:

dropout_p: in [0, 1): the share of the probabilities that is dropped. torch.manual_seed fixes which; backward drops the
    same.
softmax_scale: multiplies the scores; None is D ** -0.5.
causal: query i sees keys up to i + Sk - Sq (aligned at the bottom right).
window_size: (left, right): query i sees keys from i + Sk - Sq - left to i + Sk - Sq + right; -1 is no limit.
softcap: more than 0: scores are softcap * tanh(score / softcap). Not together with dropout.
alibi_slopes: [H] or [B, H], float32: -slope * |i + Sk - Sq - j| is added to the scores.
deterministic: the gradient of q has the same bits each time, too; those of k and v, as all else, have them anyway.
return_attn_probs: return (out, softmax_lse, S_dmask) and not out alone. softmax_lse: [B, H, Sq] or [H, total_q],
    float32, the logarithm of the sum of exp(score), +inf where a query sees no key. S_dmask: see probabilities.py; of
    shape [0] without dropout. Neither carries a gradient.

A query that sees no key gives 0. Wrong arguments raise FlashAttentionError, a ValueError and RuntimeError.
"""

from __future__ import annotations

import torch

from tilestack.compat.flash_attn import flash_attn_2_cuda as flash_attn_gpu
from tilestack.compat.flash_attn.attend import (
    attend,
    attend_with_probabilities,
    maybe_contiguous,
    options,
    round_multiple,
)
from tilestack.compat.flash_attn.errors import FlashAttentionError, check
from tilestack.compat.flash_attn.paged_keys import gather_keys
from tilestack.compat.flash_attn.probabilities import get_block_size_n
from tilestack.kernels.attention.dropout import draw_seed

__all__ = [
    "FlashAttentionError",
    "flash_attn_func",
    "flash_attn_gpu",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "maybe_contiguous",
    "round_multiple",
]


def flash_attn_func(
    q,
    k,
    v,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    """Attention. q: [B, Sq, H, D]; k, v: [B, Sk, Hk, D]. Returns out like q."""
    asked = options(
        q, k, v, dropout_p=dropout_p, softmax_scale=softmax_scale, causal=causal, window_size=window_size,
        softcap=softcap, alibi_slopes=alibi_slopes, deterministic=deterministic,
    )  # fmt: skip
    return _attend(q, k, v, asked, return_attn_probs)


def flash_attn_kvpacked_func(
    q,
    kv,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    """flash_attn_func of k and v in one tensor, kv [B, Sk, 2, Hk, D]; so is their gradient."""
    k, v = _unpack(kv, "kv", 2)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )


def flash_attn_qkvpacked_func(
    qkv,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    """flash_attn_func of q, k and v in one tensor, qkv [B, S, 3, H, D]; so is their gradient. Returns [B, S, H, D]."""
    q, k, v = _unpack(qkv, "qkv", 3)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    block_table=None,
):
    """Attention within each of B sequences that lie one after the other.

    q: [total_q, H, D]; k, v: [total_k, Hk, D].
    cu_seqlens_q, cu_seqlens_k: [B + 1], int32, on the device of q: where each sequence begins, then the end. Rows
        behind the end give 0, and have zero gradients.
    max_seqlen_q, max_seqlen_k: no sequence is longer.
    block_table: [B, pages], int32: k and v are then [blocks, page, Hk, D], page a multiple of 256, and row b of the
        table has the blocks of sequence b in order. The keys are gathered first (paged_keys.py).

    Returns out like q.
    """
    if block_table is not None:
        k, v, cu_seqlens_k = gather_keys(k, v, cu_seqlens_k, max_seqlen_k, block_table, None, None)
    asked = options(
        q, k, v, dropout_p=dropout_p, softmax_scale=softmax_scale, causal=causal, window_size=window_size,
        softcap=softcap, alibi_slopes=alibi_slopes, deterministic=deterministic, cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k, max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k,
    )  # fmt: skip
    return _attend(q, k, v, asked, return_attn_probs)


def flash_attn_varlen_kvpacked_func(
    q,
    kv,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    """flash_attn_varlen_func of k and v in one tensor, kv [total_k, 2, Hk, D]; so is their gradient."""
    k, v = _unpack(kv, "kv", 2)
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
        window_size, softcap, alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


def flash_attn_varlen_qkvpacked_func(
    qkv,
    cu_seqlens,
    max_seqlen,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    """flash_attn_varlen_func of q, k and v in one tensor, qkv [total, 3, H, D]; so is their gradient."""
    q, k, v = _unpack(qkv, "qkv", 3)
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, dropout_p, softmax_scale, causal, window_size,
        softcap, alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


def flash_attn_with_kvcache(
    q,
    k_cache,
    v_cache,
    k=None,
    v=None,
    rotary_cos=None,
    rotary_sin=None,
    cache_seqlens: int | torch.Tensor | None = None,
    cache_batch_idx: torch.Tensor | None = None,
    cache_leftpad: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    rotary_interleaved=True,
    alibi_slopes=None,
    num_splits=0,
    return_softmax_lse=False,
):
    """Attention over a cache of keys, into which new ones are written first, in place. No gradient.

    q: [B, Sq, H, D].
    k_cache, v_cache: [B or more, Sc, Hk, D], or with block_table [blocks, page, Hk, D], page a multiple of 256.
    k, v: [B, Snew, Hk, D], written at cache_seqlens and after it; attention then runs over these keys too.
    rotary_cos, rotary_sin: [Sr, R / 2], the dtype of q, Sr at least the length of the cache: rotates the first R
        columns of k, and of q, at their positions from cache_seqlens on; all of q at cache_seqlens if it is neither
        causal nor windowed. Only with k.
    cache_seqlens: int, or int32 [B]: the keys in the cache.
    cache_batch_idx: int32 [B]: which rows of the cache; None: row b for b.
    cache_leftpad: int32 [B]: the first key that counts.
    block_table: int32 [B, pages].
    rotary_interleaved: the columns that rotate together are (0, 1), (2, 3), ...; else (0, R / 2), (1, R / 2 + 1), ...
    num_splits: among how many programs the keys of a query are divided; 0 chooses.

    Returns out like q, or (out, softmax_lse [B, H, Sq]).
    """
    if isinstance(cache_seqlens, int):
        cache_seqlens = torch.full((q.shape[0],), cache_seqlens, dtype=torch.int32, device=q.device)
    left, right = window_size
    out, softmax_lse = flash_attn_gpu.fwd_kvcache(
        q, k_cache, v_cache, k, v, cache_seqlens, rotary_cos, rotary_sin, cache_batch_idx, cache_leftpad, block_table,
        alibi_slopes, None, softmax_scale, causal, left, right, softcap, rotary_interleaved, num_splits,
    )  # fmt: skip
    return (out, softmax_lse) if return_softmax_lse else out


def _unpack(packed: torch.Tensor, name: str, parts: int) -> tuple[torch.Tensor, ...]:
    """The parts of a packed tensor; their gradients are stacked in one."""
    fits = packed.dim() in (4, 5) and packed.shape[-3] == parts
    check(fits, name, f"[..., {parts}, heads, head_dim] with 4 or 5 dimensions", list(packed.shape))
    return packed.unbind(-3)


def _attend(q, k, v, asked, return_attn_probs):
    has_dropout = asked["dropout_p"] > 0
    rng_state = draw_seed(q.device) if has_dropout else None
    if return_attn_probs:
        return attend_with_probabilities(q, k, v, asked, rng_state, has_dropout)
    return attend(q, k, v, asked, rng_state)[0]


# ---- what other projects import: flash-attn's ops (no gradient flows through them) and the names of its autograd ----


def _flash_attn_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: torch.Tensor | None,
    return_softmax: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(out, softmax_lse, S_dmask, rng_state) of dense input."""
    return tuple(
        flash_attn_gpu.fwd(
            q,
            k,
            v,
            None,
            alibi_slopes,
            dropout_p,
            softmax_scale,
            causal,
            window_size_left,
            window_size_right,
            softcap,
            return_softmax,
            None,
        )  # fmt: skip
    )


def _flash_attn_varlen_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    return_softmax: bool = False,
    block_table: torch.Tensor | None = None,
    leftpad_k: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
    zero_tensors: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(out, softmax_lse, S_dmask, rng_state) of packed input."""
    return tuple(
        flash_attn_gpu.varlen_fwd(
            q,
            k,
            v,
            None,
            cu_seqlens_q,
            cu_seqlens_k,
            seqused_k,
            leftpad_k,
            block_table,
            alibi_slopes,
            max_seqlen_q,
            max_seqlen_k,
            dropout_p,
            softmax_scale,
            zero_tensors,
            causal,
            window_size_left,
            window_size_right,
            softcap,
            return_softmax,
            None,
        )  # fmt: skip
    )


def _flash_attn_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    softmax_lse: torch.Tensor,
    dq: torch.Tensor | None,
    dk: torch.Tensor | None,
    dv: torch.Tensor | None,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: torch.Tensor | None,
    deterministic: bool,
    rng_state: torch.Tensor | None = None,
) -> torch.Tensor:
    """Write dq, dk and dv of dense input; returns softmax_d. out and softmax_lse may be those of more keys."""
    *_, softmax_d = flash_attn_gpu.bwd(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, alibi_slopes, dropout_p, softmax_scale, causal,
        window_size_left, window_size_right, softcap, deterministic, None, rng_state,
    )  # fmt: skip
    return softmax_d


def _flash_attn_varlen_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    softmax_lse: torch.Tensor,
    dq: torch.Tensor | None,
    dk: torch.Tensor | None,
    dv: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: torch.Tensor | None,
    deterministic: bool,
    rng_state: torch.Tensor | None = None,
    zero_tensors: bool = False,
) -> torch.Tensor:
    """Write dq, dk and dv of packed input; returns softmax_d. out and softmax_lse may be those of more keys."""
    *_, softmax_d = flash_attn_gpu.varlen_bwd(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, alibi_slopes, max_seqlen_q,
        max_seqlen_k, dropout_p, softmax_scale, zero_tensors, causal, window_size_left, window_size_right, softcap,
        deterministic, None, rng_state,
    )  # fmt: skip
    return softmax_d


_get_block_size_n = get_block_size_n
# flash-attn has its ops a second time, as torch knows them; what torch knows here are tilestack's own, further down
_wrapped_flash_attn_forward = _flash_attn_forward
_wrapped_flash_attn_varlen_forward = _flash_attn_varlen_forward
_wrapped_flash_attn_backward = _flash_attn_backward
_wrapped_flash_attn_varlen_backward = _flash_attn_varlen_backward


def _autograd_name(name: str, function):
    """A class with the `apply` of flash-attn's autograd function: the public arguments, then whether to record.

    The autograd itself is that of tilestack's op.
    """

    def apply(*arguments):
        *public, is_grad_enabled = arguments
        with torch.set_grad_enabled(is_grad_enabled and torch.is_grad_enabled()):
            return function(*public)

    return type(name, (), {"apply": staticmethod(apply), "__doc__": f"`apply` is {function.__name__}."})


FlashAttnFunc = _autograd_name("FlashAttnFunc", flash_attn_func)
FlashAttnKVPackedFunc = _autograd_name("FlashAttnKVPackedFunc", flash_attn_kvpacked_func)
FlashAttnQKVPackedFunc = _autograd_name("FlashAttnQKVPackedFunc", flash_attn_qkvpacked_func)
FlashAttnVarlenFunc = _autograd_name("FlashAttnVarlenFunc", flash_attn_varlen_func)
FlashAttnVarlenKVPackedFunc = _autograd_name("FlashAttnVarlenKVPackedFunc", flash_attn_varlen_kvpacked_func)
FlashAttnVarlenQKVPackedFunc = _autograd_name("FlashAttnVarlenQKVPackedFunc", flash_attn_varlen_qkvpacked_func)
