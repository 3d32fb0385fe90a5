"""The names under which transformers finds us: attn_implementation="tilestack", experts_implementation="tilestack"."""

from __future__ import annotations

import functools
import weakref

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from tilestack.kernels import attention, moe
from tilestack.models.kernel_choice import KernelChoice
from tilestack.models.packing import Packing, find_packing

NAME = "tilestack"
_AUTOMATIC = KernelChoice()


def register() -> None:
    """Make `attn_implementation="tilestack"` and `experts_implementation="tilestack"` known to transformers."""
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, attention_mask)
    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset=0,
    kv_offset=0,
    attention_mask=None,
    use_vmap=False,
    **kwargs,
) -> torch.Tensor | None:
    """What transformers hands to every layer as `attention_mask`, made once per forward.

    Whole sequences (training, prefill): the user's mask [B, S], or None. Where a cache has more keys than there are
    queries, or a mask function is the user's own: the mask [B, 1, Sq, Sk] that SDPA takes.
    """
    whole = isinstance(q_offset, int) and q_offset == 0 and kv_length == q_length and not use_vmap
    if whole:
        return attention_mask
    kwargs["allow_is_causal_skip"] = False
    return sdpa_mask(
        batch_size, q_length, kv_length, q_offset, kv_offset, attention_mask=attention_mask, use_vmap=use_vmap, **kwargs
    )


_MISSING = object()


def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface over our attention op.

    query: [B, Hq, Sq, D]; key, value: [B, Hkv, Sk, D]; views of [B, S, heads, D] are read in place.
    attention_mask: [B, S] or None; a mask [B, 1, Sq, Sk] goes to transformers' own SDPA path.
    kwargs: `packing`, or what it is found from: position_ids, cu_seq_lens_q, max_length_q.

    Returns (out [B, Sq, Hq, D], None).
    """
    if attention_mask is not None and attention_mask.dim() == 4:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )
    packing = kwargs.get("packing", _MISSING)
    if packing is _MISSING:
        packing = _packing_of_this_forward(query, attention_mask, kwargs)
    causal = module.is_causal if is_causal is None else is_causal
    window = (sliding_window - 1, 0) if sliding_window is not None and causal else (-1, -1)
    tensors = [tensor.transpose(1, 2) for tensor in (query, key, value)]
    choice = kernels_of(module).attention
    arguments = {"causal": causal, "softmax_scale": scaling, "window_size": window, "implementation": choice}
    arguments["dropout_p"] = dropout
    attend = functools.partial(_attend, packing, arguments)
    sequence = getattr(module, "sequence", None)
    return (attend(*tensors) if sequence is None else sequence.attend(attend, *tensors)), None


def _attend(packing: Packing | None, arguments: dict, *tensors: torch.Tensor) -> torch.Tensor:
    """The op over q, k and v [B, S, heads, D], of whole rows."""
    if packing is None:
        return attention(*tensors, **arguments)
    out = attention(
        *map(packing.gather, tensors),
        cu_seqlens_q=packing.cu_seqlens,
        cu_seqlens_k=packing.cu_seqlens,
        max_seqlen_q=packing.max_seqlen,
        max_seqlen_k=packing.max_seqlen,
        **arguments,
    )
    return packing.scatter(out, *tensors[0].shape[:2])


def experts_forward(
    self: torch.nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """transformers' experts interface over our moe op: hidden_states [T, H], the other two [T, K]; returns [T, H]."""
    x, gate_up, down = autocast(hidden_states, self.gate_up_proj, self.down_proj)
    weights = top_k_weights.to(torch.promote_types(x.dtype, torch.float32))
    sums = {}
    if (x.requires_grad or weights.requires_grad) and not torch.compiler.is_compiling():
        # an engine that sums gradients over micro-batches, and that nobody hooks, leaves its sums at the parameters
        named = {"gate_up_grad": self.gate_up_proj, "down_grad": self.down_proj}
        sums = {name: getattr(each, "gradient_sum", None) for name, each in named.items() if not each._backward_hooks}
    most = getattr(top_k_index, "most_routes", None)  # of ids that other ranks sent
    return moe(x, gate_up, down, top_k_index, weights, most_routes=most, **sums, implementation=kernels_of(self).moe)


def kernels_of(module: torch.nn.Module) -> KernelChoice:
    """The choice that `enable` left on the module; without one, every op is automatic."""
    return getattr(module, "kernels", _AUTOMATIC)


def autocast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The tensors in autocast's dtype where autocast is on: it does not know our ops."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    return tuple(tensor.to(torch.get_autocast_dtype(device)) for tensor in tensors)


_last: tuple = ((None, None), None)  # the mask and the positions of the last forward, and their packing


def _packing_of_this_forward(query: torch.Tensor, mask: torch.Tensor | None, kwargs: dict) -> Packing | None:
    """The packing where transformers' own model calls us, layer by layer: every layer passes the same two tensors."""
    global _last
    positions, cu_seqlens = kwargs.get("position_ids"), kwargs.get("cu_seq_lens_q")
    batch, _, seqlen, _ = query.shape
    if cu_seqlens is not None:
        return find_packing(batch, seqlen, cu_seqlens=cu_seqlens, max_seqlen=kwargs.get("max_length_q"))
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
        return find_packing(batch, seqlen, mask, positions)
    known, packing = _last
    if not all(map(_is, known, (mask, positions))):
        packing = find_packing(batch, seqlen, mask, positions)
        _last = ((_weak(mask), _weak(positions)), packing)
    return packing


def _weak(tensor: torch.Tensor | None) -> tuple | None:
    return None if tensor is None else (weakref.ref(tensor), tensor._version)


def _is(known: tuple | None, tensor: torch.Tensor | None) -> bool:
    if known is None or tensor is None:
        return known is tensor
    return known[0]() is tensor and known[1] == tensor._version
