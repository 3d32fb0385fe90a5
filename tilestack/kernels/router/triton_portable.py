"""router in Triton.

Forward: a program takes blocks of tokens, all E logits of each in registers, and finds the K largest one after the
other. It keeps its share of the two statistics in registers; a second, small kernel sums the shares in a fixed order.
Backward: the softmax again, then both gradients (through the weights and through the probability sum) in one pass.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tilestack.kernels import launch
from tilestack.kernels.dispatch import Call
from tilestack.kernels.router.configs import (
    MAX_EXPERTS,
    MAX_TOP_K,
    PROGRAMS_PER_MULTIPROCESSOR,
    WARPS,
    block_tokens,
)

AUXILIARY = ()
SAVED = ("logits", "topk_ids", "token_mask")


def refuses(call: Call) -> str | None:
    experts = call.shape("logits")[1]
    if call.dtype("logits") == torch.float64:
        return "has no float64 path"
    if experts > MAX_EXPERTS:
        return f"keeps a token's logits in registers, up to E = {MAX_EXPERTS}, got {experts}"
    if call.params.top_k > MAX_TOP_K:
        return f"finds the largest one after the other, up to K = {MAX_TOP_K}, got {call.params.top_k}"
    return None


@triton.jit
def _softmax(logits_ptr, stride_logits, tokens, experts, T, E):
    """Logits and their softmax, float32; 0 in the columns beyond E."""
    inside = (tokens < T)[:, None] & (experts < E)[None, :]
    ptrs = logits_ptr + tokens.to(tl.int64)[:, None] * stride_logits + experts[None, :]
    logits = tl.load(ptrs, mask=inside, other=0.0).to(tl.float32)
    masked = tl.where((experts < E)[None, :], logits, float("-inf"))
    exponentials = tl.exp(masked - tl.max(masked, 1)[:, None])
    return logits, exponentials / tl.sum(exponentials, 1)[:, None]


@triton.jit
def _ordered_keys(logits, experts, E, EXPERTS: tl.constexpr):
    """An integer for each logit, all different, in the order of preference: larger logits, then lower indices."""
    bits = tl.where(logits == 0.0, 0.0, logits).to(tl.int32, bitcast=True)  # -0 equals 0
    bits = tl.where(logits != logits, 0x7FFFFFFF, bits)  # NaN before everything, as torch sorts it
    ascending = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    keys = (ascending.to(tl.int64) << 32) + (EXPERTS - 1 - experts)[None, :]
    return tl.where((experts < E)[None, :], keys, -0x8000000000000000)


@triton.jit
def router_fwd_kernel(
    logits_ptr, token_mask_ptr, weights_ptr, ids_ptr, count_shares_ptr, probability_shares_ptr,
    stride_logits, T, E, TOP_K: tl.constexpr, TOP_K_PADDED: tl.constexpr, EXPERTS: tl.constexpr, BLOCK_T: tl.constexpr,
    NORMALIZE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    experts = tl.arange(0, EXPERTS)
    choices = tl.arange(0, TOP_K_PADDED)
    count_share = tl.zeros([EXPERTS], tl.int32)
    probability_share = tl.zeros([EXPERTS], tl.float32)
    for start in range(tl.program_id(0) * BLOCK_T, T, tl.num_programs(0) * BLOCK_T):
        tokens = start + tl.arange(0, BLOCK_T)
        logits, probability = _softmax(logits_ptr, stride_logits, tokens, experts, T, E)
        keys = _ordered_keys(logits, experts, E, EXPERTS)
        counted = tokens < T
        if MASKED:
            counted = counted & (tl.load(token_mask_ptr + tokens, mask=tokens < T, other=0) != 0)
        weights = tl.zeros([BLOCK_T, TOP_K_PADDED], tl.float32)
        ids = tl.zeros([BLOCK_T, TOP_K_PADDED], tl.int32)
        for k in tl.static_range(TOP_K):
            best = tl.max(keys, 1)
            chosen = keys == best[:, None]
            weight = tl.sum(tl.where(chosen, probability, 0.0), 1)
            expert = EXPERTS - 1 - (best & (EXPERTS - 1)).to(tl.int32)
            weights = tl.where((choices == k)[None, :], weight[:, None], weights)
            ids = tl.where((choices == k)[None, :], expert[:, None], ids)
            count_share += tl.sum((chosen & counted[:, None]).to(tl.int32), 0)
            keys = tl.where(chosen, -0x8000000000000000, keys)
        if NORMALIZE:
            weights = weights / tl.sum(weights, 1)[:, None]
        probability_share += tl.sum(tl.where(counted[:, None], probability, 0.0), 0)
        offs = tokens.to(tl.int64)[:, None] * TOP_K + choices[None, :]
        inside = (tokens < T)[:, None] & (choices < TOP_K)[None, :]
        tl.store(weights_ptr + offs, weights, mask=inside)
        tl.store(ids_ptr + offs, ids, mask=inside)
    shares = tl.program_id(0) * E + experts
    tl.store(count_shares_ptr + shares, count_share, mask=experts < E)
    tl.store(probability_shares_ptr + shares, probability_share, mask=experts < E)


@triton.jit
def router_fwd_statistics_kernel(
    count_shares_ptr, probability_shares_ptr, counts_ptr, probability_sum_ptr, n_shares, E,
    BLOCK_E: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    experts = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    counts = tl.zeros([BLOCK_E], tl.int32)
    probability_sum = tl.zeros([BLOCK_S, BLOCK_E], tl.float32)
    for start in range(0, n_shares, BLOCK_S):
        shares = start + tl.arange(0, BLOCK_S)
        offs = shares[:, None] * E + experts[None, :]
        inside = (shares < n_shares)[:, None] & (experts < E)[None, :]
        counts += tl.sum(tl.load(count_shares_ptr + offs, mask=inside, other=0), 0)
        probability_sum += tl.load(probability_shares_ptr + offs, mask=inside, other=0.0)
    tl.store(counts_ptr + experts, counts.to(tl.float32), mask=experts < E)
    tl.store(probability_sum_ptr + experts, tl.sum(probability_sum, 0), mask=experts < E)


@triton.jit
def router_bwd_kernel(
    dweights_ptr, dprobability_sum_ptr, logits_ptr, ids_ptr, token_mask_ptr, dlogits_ptr, stride_logits, T, E,
    TOP_K: tl.constexpr, EXPERTS: tl.constexpr, BLOCK_T: tl.constexpr,
    NORMALIZE: tl.constexpr, MASKED: tl.constexpr, HAS_DWEIGHTS: tl.constexpr, HAS_DSUM: tl.constexpr,
):  # fmt: skip
    # with g the gradient of the chosen weights, p the probabilities and S the sum of the chosen ones:
    #   dp = g, or normalised (g - sum(g * p) / S) / S on the chosen, plus dprobability_sum on counted tokens
    #   dlogits = p * (dp - sum(p * dp))
    experts = tl.arange(0, EXPERTS)
    tokens = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = (tokens < T)[:, None] & (experts < E)[None, :]
    _, probability = _softmax(logits_ptr, stride_logits, tokens, experts, T, E)
    dprobability = tl.zeros([BLOCK_T, EXPERTS], tl.float32)
    if HAS_DWEIGHTS:
        is_chosen = tl.zeros([BLOCK_T, EXPERTS], tl.float32)
        routes = tokens.to(tl.int64) * TOP_K
        for k in tl.static_range(TOP_K):
            expert = tl.load(ids_ptr + routes + k, mask=tokens < T, other=-1)
            dweight = tl.load(dweights_ptr + routes + k, mask=tokens < T, other=0.0)
            chosen = expert[:, None] == experts[None, :]
            dprobability += tl.where(chosen, dweight[:, None], 0.0)
            is_chosen += chosen.to(tl.float32)
        if NORMALIZE:
            chosen_sum = tl.sum(probability * is_chosen, 1)
            chosen_sum = tl.where(tokens < T, chosen_sum, 1.0)
            mean = tl.sum(dprobability * probability, 1) / chosen_sum
            dprobability = (dprobability - mean[:, None] * is_chosen) / chosen_sum[:, None]
    if HAS_DSUM:
        dsum = tl.load(dprobability_sum_ptr + experts, mask=experts < E, other=0.0)[None, :]
        if MASKED:
            counted = tl.load(token_mask_ptr + tokens, mask=tokens < T, other=0) != 0
            dprobability += tl.where(counted[:, None], dsum, 0.0)
        else:
            dprobability += dsum
    # divided by their sum, which is 1 but for rounding: that rounding would be multiplied by dp
    mean = tl.sum(probability * dprobability, 1) / tl.sum(probability, 1)
    dlogits = probability * (dprobability - mean[:, None])
    offs = tokens.to(tl.int64)[:, None] * E + experts[None, :]
    tl.store(dlogits_ptr + offs, dlogits.to(dlogits_ptr.dtype.element_ty), mask=inside)


def forward(logits, token_mask, params):
    tokens, experts = logits.shape
    flat, mask, width = launch.rows(logits), _bytes(token_mask), launch.next_power_of_2(experts)
    block = block_tokens(width)
    n_programs = min(launch.cdiv(tokens, block), PROGRAMS_PER_MULTIPROCESSOR * launch.multiprocessors(logits))
    topk_weights = logits.new_empty((tokens, params.top_k), dtype=torch.float32)
    topk_ids = logits.new_empty((tokens, params.top_k), dtype=torch.int32)
    count_shares = logits.new_empty((n_programs, experts), dtype=torch.int32)
    probability_shares = logits.new_empty((n_programs, experts), dtype=torch.float32)
    if n_programs:
        with launch.on_device(logits):
            router_fwd_kernel[(n_programs,)](
                flat, flat if mask is None else mask, topk_weights, topk_ids, count_shares, probability_shares,
                flat.stride(0), tokens, experts, TOP_K=params.top_k,
                TOP_K_PADDED=launch.next_power_of_2(params.top_k), EXPERTS=width, BLOCK_T=block,
                NORMALIZE=params.normalize, MASKED=mask is not None, num_warps=WARPS,
            )  # fmt: skip
    return topk_weights, topk_ids, *_sum_shares(count_shares, probability_shares)


def _sum_shares(count_shares: torch.Tensor, probability_shares: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    n_shares, experts = count_shares.shape
    counts, probability_sum = (probability_shares.new_empty(experts) for _ in range(2))
    with launch.on_device(counts):
        router_fwd_statistics_kernel[(launch.cdiv(experts, 32),)](
            count_shares, probability_shares, counts, probability_sum, n_shares, experts,
            BLOCK_E=32, BLOCK_S=64, num_warps=WARPS,
        )  # fmt: skip
    return counts, probability_sum


def backward(dtopk_weights, dtopk_ids, dtokens, dprobability_sum, logits, topk_ids, token_mask, *, needs, params):
    tokens, experts = logits.shape
    dlogits = logits.new_empty((tokens, experts))
    if tokens == 0:
        return (dlogits,)
    flat, mask, width = launch.rows(logits), _bytes(token_mask), launch.next_power_of_2(experts)
    block = block_tokens(width)
    with launch.on_device(logits):
        router_bwd_kernel[(launch.cdiv(tokens, block),)](
            flat if dtopk_weights is None else dtopk_weights.contiguous(),
            flat if dprobability_sum is None else dprobability_sum.contiguous(),
            flat, topk_ids, flat if mask is None else mask, dlogits, flat.stride(0), tokens, experts,
            TOP_K=params.top_k, EXPERTS=width, BLOCK_T=block, NORMALIZE=params.normalize, MASKED=mask is not None,
            HAS_DWEIGHTS=dtopk_weights is not None, HAS_DSUM=dprobability_sum is not None, num_warps=WARPS,
        )  # fmt: skip
    return (dlogits,)


def _bytes(token_mask: torch.Tensor | None) -> torch.Tensor | None:
    return None if token_mask is None else token_mask.contiguous().view(torch.uint8)
