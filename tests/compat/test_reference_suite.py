"""Behaviours that flash-attn's own test suite relies on, beyond the values that test_flash_attention.py checks.

On a GPU with the suite's repeats and sizes, on a CPU with small ones.
"""

import functools

import pytest
import torch
from naive_attention import DEVICE, random
from test_flash_attention import NAMES, compare, inputs, offsets, run

from tilestack.compat.flash_attn import (
    attend,
    flash_attn_2_cuda,
    flash_attn_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
)

GPU = DEVICE.type == "cuda"
REPEATS = 250 if GPU else 2


@pytest.fixture(params=["chosen", "tilestack-triton"])
def implementation(request, monkeypatch):
    """What a machine chooses by itself (on a CPU the reference), and the portable kernels (there interpreted)."""
    if request.param != "chosen":
        for module, name in ((attend, "attention"), (flash_attn_2_cuda, "attention_backward")):
            named = functools.partial(getattr(module, name), implementation=request.param)
            monkeypatch.setattr(module, name, named)


@pytest.mark.parametrize("dropout_p", [0.0, 0.17])
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("kv_heads", [8, 2, 1])  # of the Hopper kernel, one, two and four items add to a key head
def test_out_lse_dk_and_dv_have_the_same_bits_each_time_also_without_deterministic(dropout_p, deterministic, kv_heads):
    batch, length = (60, 256) if GPU else (2, 24)
    q, k, v, dout = inputs(batch, length, length, heads=8, kv_heads=kv_heads, head_dim=64, dtype=torch.float16)
    options = {"causal": True, "dropout_p": dropout_p, "deterministic": deterministic}
    first, _ = run(flash_attn_func, (q, k, v), dout, **options)
    for _ in range(REPEATS):
        again, _ = run(flash_attn_func, (q, k, v), dout, **options)
        same = {name: torch.equal(*pair) for name, *pair in zip(NAMES, again, first, strict=True)}
        assert all(same[name] for name in NAMES if deterministic or name != "dq"), same


def test_packed_gradients_have_the_same_bits_each_time():
    lengths = (300, 5, 0, 700) if GPU else (20, 5, 0, 15)
    cu = offsets(lengths)
    q, k, v, dout = (each[0].detach().requires_grad_() for each in inputs(1, sum(lengths), sum(lengths), head_dim=64))
    more = (cu, cu, max(lengths), max(lengths))
    first, _ = run(flash_attn_varlen_func, (q, k, v), dout, *more, causal=True, deterministic=True)
    for _ in range(REPEATS):
        again, _ = run(flash_attn_varlen_func, (q, k, v), dout, *more, causal=True, deterministic=True)
        assert all(torch.equal(*pair) for pair in zip(again, first, strict=True))


@pytest.mark.parametrize("dropout_p", [0.17, 0.5])
def test_dropout_drops_its_share_and_follows_the_seed(dropout_p):
    batch, length = (4, 512) if GPU else (2, 128)
    q, k, v, _ = (each.detach() for each in inputs(batch, length, length, head_dim=32))

    def call(seed):
        torch.manual_seed(seed)
        return flash_attn_func(q, k, v, dropout_p, return_attn_probs=True)

    out, lse, probabilities = call(0)
    again, other = call(0), call(1)
    assert torch.equal(again[0], out) and torch.equal(again[2], probabilities) and not torch.equal(other[0], out)
    assert torch.equal(other[1], lse)  # of all keys, dropped or not
    dropped = torch.signbit(probabilities).float()
    assert abs(dropped.mean().item() - dropout_p) < 0.01
    by_head = dropped.flatten(2).mean(-1)
    sigma = (dropout_p * (1 - dropout_p) / length**2) ** 0.5
    assert (by_head - dropout_p).abs().max() < 6 * sigma
    torch.manual_seed(0)
    first, second = (flash_attn_func(q, k, v, dropout_p) for _ in range(2))
    assert torch.equal(first, out) and not torch.equal(second, out)  # each call moves the generator on


def test_checkpointing_drops_the_same_again():
    q, k, v, dout = inputs(1, 20, 20)

    def call(q, k, v):
        return flash_attn_func(q, k, v, 0.3, causal=True)

    results = []
    for function in (call, functools.partial(torch.utils.checkpoint.checkpoint, call, use_reentrant=False)):
        torch.manual_seed(1)
        results.append(torch.autograd.grad(function(q, k, v), (q, k, v), dout))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@pytest.mark.parametrize("length", [1, 2, 5, 17, 64, 65, 127, 128] if GPU else [1, 5, 33])
@pytest.mark.parametrize("causal", [False, True])
def test_keys_behind_the_end_do_not_reach_the_gradients_of_large_inputs(implementation, length, causal):
    q, k, v, dout = inputs(1, length, length, heads=2, dtype=torch.float16)
    q, k, v = ((scale * each.detach()).requires_grad_() for scale, each in ((5, q), (3, k), (3, v)))
    ours, _ = run(flash_attn_func, (q, k, v), dout, causal=causal)
    compare(ours, q, k, v, dout, causal=causal, few_keys=True)
    assert all(each.isfinite().all() for each in ours)


def test_one_key_for_many_queries_and_maxima_that_are_totals_give_numbers(implementation):
    lengths = (76, 34, 146)
    total = sum(lengths)
    q = random(total, 2, 16, seed=1)
    k, v = (random(3, 2, 16, seed=seed) for seed in (2, 3))
    more = (offsets(lengths), offsets((1, 1, 1)), total, total)
    dout = random(total, 2, 16, seed=4).detach()
    (out, lse, dq, dk, dv), _ = run(flash_attn_varlen_func, (q, k, v), dout, *more)
    expected = v.repeat_interleave(torch.tensor(lengths, device=DEVICE), 0)
    assert torch.equal(out, expected)
    assert all(each.isfinite().all() for each in (lse, dq, dk, dv))


@pytest.mark.parametrize("kind", ["", "softcap", "dropout", "alibi", "window"])
def test_the_portable_kernels_give_the_same_as_the_definition(implementation, kind):
    options = {
        "": {},
        "softcap": {"softcap": 2.0},
        "dropout": {"dropout_p": 0.17},
        "alibi": {"alibi_slopes": torch.tensor([[0.5, 0.25], [0.1, 0.7]], device=DEVICE)},
        "window": {"window_size": torch.tensor([9, 3])},
    }[kind]
    q, k, v, dout = inputs(2, 21, 37, heads=2, kv_heads=1, head_dim=20)
    ours, keep = run(flash_attn_func, (q, k, v), dout, causal=kind != "window", **options)
    keep = keep[..., :21, :37] if kind == "dropout" else None
    compare(ours, q, k, v, dout, causal=kind != "window", keep=keep, **options)


def compiled(function):
    return torch.compile(function, fullgraph=True, backend="aot_eager")


def test_dense_and_packed_attention_compile_into_one_graph():
    q, k, v, dout = inputs(2, 9, 12, head_dim=12)
    options = {"dropout_p": 0.1, "causal": True, "window_size": (5, 0), "return_attn_probs": False}
    results = []
    for function in (flash_attn_func, compiled(flash_attn_func)):
        torch.manual_seed(2)
        out = function(q, k, v, **options)
        results.append((out, *torch.autograd.grad(out, (q, k, v), dout)))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
    cu = offsets((4, 5))
    packed = [each[0].detach().requires_grad_() for each in (q, k[:, :9], v[:, :9])]
    outs = [
        function(*packed, cu, cu, 5, 5, softcap=1.5)
        for function in (flash_attn_varlen_func, compiled(flash_attn_varlen_func))
    ]
    assert torch.equal(*outs)
    assert torch.equal(*(torch.autograd.grad(out, packed[1], dout[0])[0] for out in outs))


def test_packed_projections_and_the_cache_compile_into_one_graph():
    qkv = random(2, 9, 3, 2, 16, seed=1)
    outs = [function(qkv, causal=True) for function in (flash_attn_qkvpacked_func, compiled(flash_attn_qkvpacked_func))]
    assert torch.equal(*outs)
    caches = [[random(2, 16, 2, 16, seed=seed).detach() for seed in (2, 3)] for _ in range(2)]
    q, k, v = qkv.detach()[:, :1].unbind(2)
    lengths = torch.tensor([4, 9], dtype=torch.int32, device=DEVICE)
    outs = [
        function(q, *pair, k=k, v=v, cache_seqlens=lengths, causal=True)
        for function, pair in zip((flash_attn_with_kvcache, compiled(flash_attn_with_kvcache)), caches, strict=True)
    ]
    assert torch.equal(*outs) and torch.equal(caches[0][0], caches[1][0])


def test_lse_carries_no_gradient_of_its_own():
    q, k, v, dout = inputs(1, 6, 6)
    out, lse, _ = flash_attn_func(q, k, v, return_attn_probs=True)
    with_lse = torch.autograd.grad((out * dout).sum() + lse.sum(), q)[0]
    assert torch.equal(with_lse, torch.autograd.grad(flash_attn_func(q, k, v), q, dout)[0])


@pytest.mark.skipif(not GPU, reason="64k tokens are too many for a CPU")
def test_memory_is_linear_in_the_length():
    q, k, v, dout = inputs(1, 65_536, 65_536, heads=2, kv_heads=1, head_dim=64)
    torch.cuda.reset_peak_memory_stats()
    out = flash_attn_func(q, k, v, 0.1, causal=True)
    torch.autograd.grad(out, (q, k, v), dout)
    assert torch.cuda.max_memory_allocated() < 40 * q.numel() * q.element_size()
