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
    SUM_EXPERTS,
    SUM_SHARES,
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
    """Logits as they are stored; in float32 their exponentials below the maximum (0 in the columns beyond E), the
    maximum and the sum of the exponentials."""
    inside = (tokens < T)[:, None] & (experts < E)[None, :]
    ptrs = logits_ptr + tokens.to(tl.int64)[:, None] * stride_logits + experts[None, :]
    logits = tl.load(ptrs, mask=inside, other=0.0)
    masked = tl.where((experts < E)[None, :], logits.to(tl.float32), float("-inf"))
    maximum = tl.max(masked, 1)
    exponentials = tl.exp(masked - maximum[:, None])
    return logits, exponentials, maximum, tl.sum(exponentials, 1)


@triton.jit
def _ordered_keys(logits, experts, E, EXPERTS: tl.constexpr):
    """An integer for each logit, all different, in the order of preference: larger logits, then lower indices.

    16-bit logits and their index fit into 32 bits, which halves the work of a maximum."""
    canonical = tl.where(logits == 0.0, 0.0, logits).to(logits.dtype)  # -0 equals 0
    if logits.dtype.primitive_bitwidth == 16:
        bits = canonical.to(tl.int16, bitcast=True).to(tl.int32)
        bits = tl.where(logits != logits, 0x7FFF, bits)  # NaN before everything, as torch sorts it
        ascending = bits ^ ((bits >> 15) & 0x7FFF)
        keys = (ascending << 16) + (EXPERTS - 1 - experts)[None, :]
        return tl.where((experts < E)[None, :], keys, -0x80000000)
    else:
        bits = canonical.to(tl.int32, bitcast=True)
        bits = tl.where(logits != logits, 0x7FFFFFFF, bits)
        ascending = bits ^ ((bits >> 31) & 0x7FFFFFFF)
        keys = (ascending.to(tl.int64) << 32) + (EXPERTS - 1 - experts)[None, :]
        return tl.where((experts < E)[None, :], keys, -0x8000000000000000)


@triton.jit
def _logit_of_key(key, dtype: tl.constexpr):
    if dtype.primitive_bitwidth == 16:
        ascending = key >> 16
        bits = ascending ^ ((ascending >> 15) & 0x7FFF)
        return bits.to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
    else:
        ascending = (key >> 32).to(tl.int32)
        return (ascending ^ ((ascending >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def router_fwd_kernel(
    logits_ptr, token_mask_ptr, weights_ptr, ids_ptr, count_shares_ptr, probability_shares_ptr, z_shares_ptr,
    stride_logits, T, E, TOP_K: tl.constexpr, TOP_K_PADDED: tl.constexpr, EXPERTS: tl.constexpr, BLOCK_T: tl.constexpr,
    NORMALIZE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    LOWEST: tl.constexpr = -0x80000000 if logits_ptr.dtype.element_ty.primitive_bitwidth == 16 else -0x8000000000000000
    experts = tl.arange(0, EXPERTS)
    choices = tl.arange(0, TOP_K_PADDED)
    # shares are kept for each place in the block: a sum over its tokens, at the end, costs an exchange between warps
    counts = tl.zeros([BLOCK_T, EXPERTS], tl.int32)
    probabilities = tl.zeros([BLOCK_T, EXPERTS], tl.float32)
    z = tl.zeros([BLOCK_T], tl.float32)
    for start in range(tl.program_id(0) * BLOCK_T, T, tl.num_programs(0) * BLOCK_T):
        tokens = start + tl.arange(0, BLOCK_T)
        logits, exponentials, maximum, total = _softmax(logits_ptr, stride_logits, tokens, experts, T, E)
        keys = _ordered_keys(logits, experts, E, EXPERTS)
        counted = tokens < T
        if MASKED:
            counted = counted & (tl.load(token_mask_ptr + tokens, mask=tokens < T, other=0) != 0)
        weights = tl.zeros([BLOCK_T, TOP_K_PADDED], tl.float32)
        ids = tl.zeros([BLOCK_T, TOP_K_PADDED], tl.int32)
        for k in tl.static_range(TOP_K):
            best = tl.max(keys, 1)
            weight = tl.exp(_logit_of_key(best, logits.dtype) - maximum) / total
            expert = EXPERTS - 1 - (best & (EXPERTS - 1)).to(tl.int32)
            weights = tl.where((choices == k)[None, :], weight[:, None], weights)
            ids = tl.where((choices == k)[None, :], expert[:, None], ids)
            chosen = keys == best[:, None]
            keys = tl.where(chosen, LOWEST, keys)
        if NORMALIZE:
            weights = weights / tl.sum(weights, 1)[:, None]
        chosen = (keys == LOWEST) & (experts < E)[None, :]
        counts += (chosen & counted[:, None]).to(tl.int32)
        probabilities += tl.where(counted[:, None], exponentials / total[:, None], 0.0)
        lse = maximum + tl.log(total)
        z += tl.where(counted, lse * lse, 0.0)
        offs = tokens.to(tl.int64)[:, None] * TOP_K + choices[None, :]
        inside = (tokens < T)[:, None] & (choices < TOP_K)[None, :]
        tl.store(weights_ptr + offs, weights, mask=inside)
        tl.store(ids_ptr + offs, ids, mask=inside)
    shares = tl.program_id(0) * E + experts
    tl.store(count_shares_ptr + shares, tl.sum(counts, 0), mask=experts < E)
    tl.store(probability_shares_ptr + shares, tl.sum(probabilities, 0), mask=experts < E)
    tl.store(z_shares_ptr + tl.program_id(0), tl.sum(z, 0))


@triton.jit
def router_fwd_statistics_kernel(
    count_shares_ptr, probability_shares_ptr, z_shares_ptr, counts_ptr, probability_sum_ptr, z_sum_ptr, n_shares, E,
    BLOCK_E: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    experts = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    counts = tl.zeros([BLOCK_S, BLOCK_E], tl.int32)
    probability_sum = tl.zeros([BLOCK_S, BLOCK_E], tl.float32)
    z_sum = tl.zeros([BLOCK_S], tl.float32)
    for start in range(0, n_shares, BLOCK_S):
        shares = start + tl.arange(0, BLOCK_S)
        offs = shares[:, None] * E + experts[None, :]
        inside = (shares < n_shares)[:, None] & (experts < E)[None, :]
        counts += tl.load(count_shares_ptr + offs, mask=inside, other=0)
        probability_sum += tl.load(probability_shares_ptr + offs, mask=inside, other=0.0)
        z_sum += tl.load(z_shares_ptr + shares, mask=shares < n_shares, other=0.0)
    tl.store(counts_ptr + experts, tl.sum(counts, 0).to(tl.float32), mask=experts < E)
    tl.store(probability_sum_ptr + experts, tl.sum(probability_sum, 0), mask=experts < E)
    if tl.program_id(0) == 0:
        tl.store(z_sum_ptr, tl.sum(z_sum, 0))


@triton.jit
def router_bwd_kernel(
    dweights_ptr, dprobability_sum_ptr, dz_sum_ptr, logits_ptr, ids_ptr, token_mask_ptr, dlogits_ptr, stride_logits,
    T, E, TOP_K: tl.constexpr, EXPERTS: tl.constexpr, BLOCK_T: tl.constexpr,
    NORMALIZE: tl.constexpr, MASKED: tl.constexpr, HAS_DWEIGHTS: tl.constexpr, HAS_DSUM: tl.constexpr,
    HAS_DZ: tl.constexpr,
):  # fmt: skip
    # with g the gradient of the chosen weights, p the probabilities and S the sum of the chosen ones:
    #   dp = g, or normalised (g - sum(g * p) / S) / S on the chosen, plus dprobability_sum on counted tokens
    #   dlogits = p * (dp - sum(p * dp)), plus p * 2 * lse * dz_sum on counted tokens
    experts = tl.arange(0, EXPERTS)
    tokens = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = (tokens < T)[:, None] & (experts < E)[None, :]
    logits, _, maximum, total = _softmax(logits_ptr, stride_logits, tokens, experts, T, E)
    lse = maximum + tl.log(total)
    logits = tl.where((experts < E)[None, :], logits.to(tl.float32), float("-inf"))
    probability = tl.exp(logits - lse[:, None])
    counted = tokens < T
    if MASKED:
        counted = tl.load(token_mask_ptr + tokens, mask=tokens < T, other=0) != 0
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
        dsum = tl.load(dprobability_sum_ptr + experts, mask=experts < E, other=0.0)
        dprobability += tl.where(counted[:, None], dsum[None, :], 0.0)
    # divided by their sum, which is 1 but for rounding: that rounding would be multiplied by dp
    mean = tl.sum(probability * dprobability, 1) / tl.sum(probability, 1)
    shift = -mean
    if HAS_DZ:
        dz = 2.0 * lse * tl.load(dz_sum_ptr)
        shift += tl.where(counted, dz, 0.0)
    dlogits = probability * (dprobability + shift[:, None])
    offs = tokens.to(tl.int64)[:, None] * E + experts[None, :]
    tl.store(dlogits_ptr + offs, dlogits.to(dlogits_ptr.dtype.element_ty), mask=inside)


@launch.together
def forward(logits, token_mask, params):
    tokens, experts = logits.shape
    flat, mask, width = launch.rows(logits), _bytes(token_mask), launch.next_power_of_2(experts)
    block = block_tokens(width)
    n_programs = min(launch.cdiv(tokens, block), PROGRAMS_PER_MULTIPROCESSOR * launch.multiprocessors(logits))
    topk_weights = logits.new_empty((tokens, params.top_k), dtype=torch.float32)
    topk_ids = logits.new_empty((tokens, params.top_k), dtype=torch.int32)
    count_shares = logits.new_empty((n_programs, experts), dtype=torch.int32)
    probability_shares = logits.new_empty((n_programs, experts), dtype=torch.float32)
    z_shares = logits.new_empty((n_programs,), dtype=torch.float32)
    if n_programs:
        with launch.on_device(logits):
            launch.run(
                router_fwd_kernel, (n_programs,),
                flat, flat if mask is None else mask, topk_weights, topk_ids, count_shares, probability_shares,
                z_shares, flat.stride(0), tokens, experts, TOP_K=params.top_k,
                TOP_K_PADDED=launch.next_power_of_2(params.top_k), EXPERTS=width, BLOCK_T=block,
                NORMALIZE=params.normalize, MASKED=mask is not None, num_warps=WARPS,
            )  # fmt: skip
    return topk_weights, topk_ids, *_sum_shares(count_shares, probability_shares, z_shares)


def _sum_shares(count_shares: torch.Tensor, probability_shares: torch.Tensor, z_shares: torch.Tensor) -> tuple:
    n_shares, experts = count_shares.shape
    counts, probability_sum = (probability_shares.new_empty(experts) for _ in range(2))
    z_sum = probability_shares.new_empty(())
    with launch.on_device(counts):
        launch.run(
            router_fwd_statistics_kernel, (launch.cdiv(experts, SUM_EXPERTS),),
            count_shares, probability_shares, z_shares, counts, probability_sum, z_sum, n_shares, experts,
            BLOCK_E=SUM_EXPERTS, BLOCK_S=SUM_SHARES, num_warps=WARPS,
        )  # fmt: skip
    return counts, probability_sum, z_sum


def backward(
    dtopk_weights, dtopk_ids, dtokens, dprobability_sum, dz_sum, logits, topk_ids, token_mask, *, needs, params
):
    tokens, experts = logits.shape
    dlogits = logits.new_empty((tokens, experts))
    if tokens == 0:
        return (dlogits,)
    flat, mask, width = launch.rows(logits), _bytes(token_mask), launch.next_power_of_2(experts)
    block = block_tokens(width)
    with launch.on_device(logits):
        launch.run(
            router_bwd_kernel, (launch.cdiv(tokens, block),),
            *(flat if each is None else each.contiguous() for each in (dtopk_weights, dprobability_sum, dz_sum)),
            flat, topk_ids, flat if mask is None else mask, dlogits, flat.stride(0), tokens, experts,
            TOP_K=params.top_k, EXPERTS=width, BLOCK_T=block, NORMALIZE=params.normalize, MASKED=mask is not None,
            HAS_DWEIGHTS=dtopk_weights is not None, HAS_DSUM=dprobability_sum is not None,
            HAS_DZ=dz_sum is not None, num_warps=WARPS,
        )  # fmt: skip
    return (dlogits,)


def _bytes(token_mask: torch.Tensor | None) -> torch.Tensor | None:
    return None if token_mask is None else token_mask.contiguous().view(torch.uint8)
