"""S_dmask: the probabilities that return_attn_probs asks for. For tests of dropout: quadratic, and in plain torch.

flash-attn writes, for each query and key, exp(score - m) with the sign of the dropout: negative where it was dropped. m
is the largest score that its loop had met when it came to the key's block; the loop goes from the last block of keys to
the first. Who knows the width of the blocks (`get_block_size_n`) makes the probabilities from it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  (torch's own habit)

from tilestack.kernels.attention.dropout import dropout_mask
from tilestack.kernels.attention.op import AttentionParams
from tilestack.kernels.attention.reference import scores

_ROUNDED = 128  # flash-attn rounds both lengths up to this


def get_block_size_n(device: torch.device, head_dim: int, is_dropout: bool, is_causal: bool) -> int:
    """Keys of a block in flash-attn 2.8.3, on which S_dmask depends."""
    if head_dim <= 32:
        return 128
    if head_dim <= 64:
        return 64 if is_dropout else 128
    if head_dim <= 96 or head_dim > 128:
        return 64
    is_small = device.type == "cuda" and torch.cuda.get_device_capability(device) in ((8, 6), (8, 9))
    if is_small:
        return 64 if is_causal and not is_dropout else 32
    return 32 if is_dropout else 64


def s_dmask(q: torch.Tensor, k: torch.Tensor, asked: dict[str, Any], rng_state: torch.Tensor) -> torch.Tensor:
    """[B, H, Sq, Sk], both lengths rounded up to 128, in the dtype of q; what is beyond a sequence is 0.

    asked: from attend.options. Packed input is read on the host.
    """
    block = get_block_size_n(q.device, q.shape[-1], True, asked["causal"])
    if asked["cu_seqlens_q"] is None:
        return _round_up(_signed(q, k, asked, rng_state, block, 0))
    starts_q, starts_k = asked["cu_seqlens_q"].tolist(), asked["cu_seqlens_k"].tolist()
    batch = len(starts_q) - 1
    shape = (batch, q.shape[-2], asked["max_seqlen_q"], asked["max_seqlen_k"])
    found = _round_up(q.new_zeros(shape))
    for index in range(batch):
        own_q, own_k = q[None, slice(*starts_q[index : index + 2])], k[None, slice(*starts_k[index : index + 2])]
        signed = _signed(own_q, own_k, asked, rng_state, block, index)
        found[index, :, : signed.shape[-2], : signed.shape[-1]] = signed[0]
    return found


def _signed(q, k, asked, rng_state, block, first) -> torch.Tensor:
    left, right = asked["window_size"]
    right = 0 if asked["causal"] else right
    params = AttentionParams(asked["softmax_scale"], right == 0, left, right, -1, -1, True, asked["softcap"])
    weights = scores(q.float(), k.float(), asked["alibi_slopes"], params, first)
    largest = _met_by_the_loop(weights, block)
    weights = (weights - largest.masked_fill(largest == -torch.inf, 0)).exp()
    keep = dropout_mask(rng_state, asked["dropout_p"], *weights.shape, first)
    return torch.where(keep, weights, -weights).to(q.dtype)


def _met_by_the_loop(weights: torch.Tensor, block: int) -> torch.Tensor:
    """For each key, the largest score of its block and of those behind it."""
    length = weights.shape[-1]
    blocks = F.pad(weights, (0, -length % block), value=-torch.inf).unflatten(-1, (-1, block)).amax(-1)
    met = blocks.flip(-1).cummax(-1).values.flip(-1)
    return met.repeat_interleave(block, -1)[..., :length]


def _round_up(tensor: torch.Tensor) -> torch.Tensor:
    return F.pad(tensor, (0, -tensor.shape[-1] % _ROUNDED, 0, -tensor.shape[-2] % _ROUNDED))
