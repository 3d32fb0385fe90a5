"""tilestack's attention as a flash attention implementation of PyTorch.

    import tilestack.compat.torch_attention                     # makes the name known, changes nothing
    from torch.nn.attention import SDPBackend, activate_flash_attention_impl, sdpa_kernel
    activate_flash_attention_impl("TILESTACK")
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):               # see below
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)

While it is active, the functions of PyTorch that run its flash attention on CUDA run tilestack's kernels instead:
F.scaled_dot_product_attention and torch.nn.attention.varlen.varlen_attn, forward and backward.
torch.nn.attention.restore_flash_attention_impl() brings PyTorch's own back.

On Hopper and newer GPUs, F.scaled_dot_product_attention prefers cuDNN to flash attention: ask for flash attention with
sdpa_kernel as above, or torch.backends.cuda.enable_cudnn_sdp(False). varlen_attn may prefer cuDNN, too. What PyTorch
never gives to its flash attention (a mask, or is_causal with more keys than queries) does not come here either.

What differs from PyTorch's own (flash-attn 2): head dimensions up to 256 of any size, lse = -inf (not +inf) of a query
that sees no key, and no debug mask. Gradients of the same input have the same bits where
torch.use_deterministic_algorithms asks for that. Pages (block_table) and seqused_k are forward only, as in PyTorch.
"""

from __future__ import annotations

import torch

from tilestack.kernels import attention, attention_backward, attention_kvcache
from tilestack.kernels.attention.dropout import draw_seed

__all__ = ["NAME"]

NAME = "TILESTACK"


class _Active:
    """What torch's registry keeps while the implementation is active."""

    def __init__(self, dispatch_key: str):
        self._library = torch.library.Library("aten", "IMPL", dispatch_key)
        for name, function in _OVERRIDES.items():
            if hasattr(torch.ops.aten, name):  # which of them exist depends on PyTorch's version
                self._library.impl(name, function, dispatch_key)

    def remove(self) -> None:
        self._library = None  # the overrides live as long as the library


def _activate(dispatch_key: str = "CUDA") -> _Active:
    return _Active(dispatch_key)


@torch.no_grad()
def _flash_attention_forward(
    query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, return_debug_mask, *, scale=None,
    window_size_left=None, window_size_right=None, seqused_k=None, alibi_slopes=None, block_table=None,
    num_splits=None,
):  # fmt: skip
    """aten::_flash_attention_forward: query [B, S, H, D], or [total, H, D] with cum_seq_q and cum_seq_k."""
    if return_debug_mask:
        raise ValueError("tilestack: return_debug_mask must be False: no probabilities are kept")
    options = {
        "softmax_scale": scale,
        "causal": is_causal,
        "window_size": _window(window_size_left, window_size_right),
        "alibi_slopes": alibi_slopes,
        "return_lse": True,
    }
    if block_table is not None or seqused_k is not None:
        if dropout_p:
            raise ValueError(f"tilestack: dropout_p must be 0 with block_table or seqused_k, got {dropout_p}")
        out, lse = _attention_over_a_cache(query, key, value, cum_seq_q, cum_seq_k, max_q, seqused_k, block_table,
                                           num_splits, options)  # fmt: skip
        seed = None
    else:
        seed = draw_seed(query.device) if dropout_p else None
        out, lse = attention(
            query, key, value, **options, **_packing(cum_seq_q, cum_seq_k, max_q, max_k), dropout_p=dropout_p,
            dropout_seed=seed,
        )  # fmt: skip
    return (out, lse, *_randomness(query, seed))


def _flash_attention_forward_no_dropout_inplace(out, query, *args, **kwargs):
    """aten::_flash_attention_forward_no_dropout_inplace: writes out, returns lse."""
    result, lse, *_ = _flash_attention_forward(query, *args, **kwargs)
    out.copy_(result)
    return lse


@torch.no_grad()
def _flash_attention_backward(
    grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, rng_state,
    unused, *, scale=None, window_size_left=None, window_size_right=None,
):  # fmt: skip
    """aten::_flash_attention_backward."""
    return attention_backward(
        grad_out, query, key, value, out, logsumexp,
        softmax_scale=scale, causal=is_causal, window_size=_window(window_size_left, window_size_right),
        **_packing(cum_seq_q, cum_seq_k, max_q, max_k), dropout_p=dropout_p,
        dropout_seed=rng_state.view(torch.int64) if dropout_p else None,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip


def _scaled_dot_product_flash_attention(
    query, key, value, dropout_p=0.0, is_causal=False, return_debug_mask=False, *, scale=None
):
    """aten::_scaled_dot_product_flash_attention: query [B, H, S, D]."""
    max_q, max_k = query.shape[2], key.shape[2]
    out, lse, *rest = _flash_attention_forward(
        *_by_rows(query, key, value), None, None, max_q, max_k, dropout_p, is_causal, return_debug_mask, scale=scale
    )
    # in query's layout: torch.compile has laid out what follows by that
    out = torch.empty_like(query).copy_(out.transpose(1, 2)) if _heads_first(query) else out.transpose(1, 2)
    return (out, lse, None, None, max_q, max_k, *rest)


def _scaled_dot_product_flash_attention_backward(
    grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, philox_seed,
    philox_offset, *, scale=None,
):  # fmt: skip
    """aten::_scaled_dot_product_flash_attention_backward."""
    gradients = _flash_attention_backward(
        *_by_rows(grad_out, query, key, value, out), logsumexp, None, None, max_q, max_k, dropout_p, is_causal,
        philox_seed, philox_offset, scale=scale,
    )  # fmt: skip
    return _by_rows(*gradients)


def _attention_over_a_cache(
    query, key, value, cum_seq_q, cum_seq_k, max_q, seqused_k, block_table, num_splits, options
):
    """Keys in pages, or of which only the first seqused_k count."""
    if seqused_k is None:
        seqused_k = cum_seq_k.diff()
    if block_table is None and cum_seq_k is not None:
        # one row of a cache holds all sequences; each begins where its offset says
        begin = cum_seq_k[:-1].contiguous()
        rows = torch.zeros_like(begin)
        key, value, seqused_k = key[None], value[None], begin + seqused_k
        options = options | {"cache_leftpad": begin, "cache_batch_idx": rows}
    packed = {} if cum_seq_q is None else {"cu_seqlens_q": cum_seq_q, "max_seqlen_q": int(max_q)}
    return attention_kvcache(
        query, key, value, cache_seqlens=seqused_k, block_table=block_table, num_splits=num_splits or 0, **packed,
        **options,
    )  # fmt: skip


def _packing(cum_seq_q, cum_seq_k, max_q, max_k) -> dict:
    if cum_seq_q is None:
        return {}
    return {
        "cu_seqlens_q": cum_seq_q, "cu_seqlens_k": cum_seq_k, "max_seqlen_q": int(max_q), "max_seqlen_k": int(max_k)
    }  # fmt: skip


def _window(left: int | None, right: int | None) -> tuple[int, int]:
    return (-1 if left is None else max(left, -1), -1 if right is None else max(right, -1))


def _by_rows(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """[B, H, S, D] to [B, S, H, D], or back."""
    return tuple(each.transpose(1, 2) for each in tensors)


def _heads_first(query: torch.Tensor) -> bool:
    """Whether a tensor like query [B, H, S, D] has all rows of a head together: ours have all heads of a row."""
    return torch.empty_like(query, device="meta").transpose(1, 2).stride() != _row_strides(query)


def _row_strides(query: torch.Tensor) -> tuple[int, ...]:
    batch, heads, length, head_dim = query.shape
    return (length * heads * head_dim, heads * head_dim, head_dim, 1)


def _randomness(query: torch.Tensor, seed: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """rng_state, an unused number and the debug mask, in the dtypes that PyTorch says they have."""
    state = torch.zeros(2, dtype=torch.int64, device=query.device) if seed is None else seed
    unused = torch.zeros((), dtype=torch.int64, device=query.device)
    return state.view(torch.uint64), unused.view(torch.uint64), query.new_empty(0)


_OVERRIDES = {
    "_flash_attention_forward": _flash_attention_forward,
    "_flash_attention_forward_no_dropout_inplace": _flash_attention_forward_no_dropout_inplace,
    "_flash_attention_backward": _flash_attention_backward,
    "_scaled_dot_product_flash_attention": _scaled_dot_product_flash_attention,
    "_scaled_dot_product_flash_attention_backward": _scaled_dot_product_flash_attention_backward,
}

if hasattr(torch.nn.attention, "register_flash_attention_impl"):
    torch.nn.attention.register_flash_attention_impl(NAME, register_fn=_activate)
