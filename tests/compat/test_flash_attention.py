"""The public functions of tilestack.compat.flash_attn against attention that is written out, by the error rule."""

import itertools

import naive_attention as naive
import pytest
import torch
from naive_attention import DEVICE, random

from tilestack.compat.flash_attn import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)
from tilestack.testing.compare import assert_close, poisoned_memory

DROPOUT = 0.17
SLOPES = [0.5, 0.25, 0.125, 0.0625]


def offsets(lengths):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=DEVICE)


def inputs(batch, length_q, length_k, *, heads=4, kv_heads=2, head_dim=16, dtype=torch.bfloat16, scale=1.0):
    q = random(batch, length_q, heads, head_dim, dtype=dtype, seed=1, scale=scale)
    k, v = (random(batch, length_k, kv_heads, head_dim, dtype=dtype, seed=seed, scale=scale) for seed in (2, 3))
    return q, k, v, random(*q.shape, dtype=dtype, seed=4).detach()


def options_of(causal, window_size, kind, alibi):
    options = {"causal": causal, "window_size": window_size}
    if kind == "softcap":
        options["softcap"] = 2.0
    if kind == "dropout":
        options["dropout_p"] = DROPOUT
    if alibi:
        options["alibi_slopes"] = torch.tensor(SLOPES, device=DEVICE)
    return options


def run(function, tensors, dout, *more, **options):
    """out, lse and the gradients of `tensors`, with what was kept of the probabilities."""
    torch.manual_seed(7)
    with poisoned_memory():
        out, lse, probabilities = function(*tensors, *more, **options, return_attn_probs=True)
        gradients = torch.autograd.grad(out, tensors, dout)
    return (out.detach(), lse.detach(), *gradients), ~torch.signbit(probabilities)


NAMES = ("out", "lse", "dq", "dk", "dv")


def compare(ours, q, k, v, dout, *, few_keys=False, **options):
    """The error rule for (out, lse, dq, dk, dv).

    few_keys: queries have nearly all weight on one key. Then dP - delta is nearly 0, and what is left of it is the
    rounding of out in delta = rowsum(out * dout), half a unit of each element, which flash-attn's formula has and eager
    attention has not. It goes into dq with sum_j P k, and into dk with sum_i P q.
    """
    eager, exact = (each(q, k, v, dout, **options) for each in (naive.results, naive.oracle))
    for name, found in zip(NAMES, ours, strict=True):
        if not (few_keys and name in ("dq", "dk")):
            assert_close(name, found, eager[name], exact[name])
    if few_keys:
        half_unit = torch.finfo(q.dtype).eps / 2
        delta = half_unit * (exact["out"] * dout.cpu()).abs().sum(-1).amax()
        scale = options.get("softmax_scale") or q.shape[-1] ** -0.5
        inputs = {"dq": k.abs().amax(), "dk": q.shape[1] * q.abs().amax()}
        for found, (name, largest) in zip(ours[2:4], inputs.items(), strict=True):
            error, eager_error = ((each.cpu().double() - exact[name]).abs().amax() for each in (found, eager[name]))
            rounding = 2 * half_unit * exact[name].abs().amax() + scale * delta * largest.cpu()
            assert error <= 2 * eager_error + rounding, name


COMBINATIONS = list(
    itertools.product((False, True), ((-1, -1), (5, 2), (3, -1)), ("", "softcap", "dropout"), (False, True))
)


@pytest.mark.parametrize(("causal", "window_size", "kind", "alibi"), COMBINATIONS)
def test_every_combination_of_features_is_right_dense(causal, window_size, kind, alibi):
    lengths = (21, 13) if alibi else (13, 21)
    q, k, v, dout = inputs(2, *lengths)
    options = options_of(causal, window_size, kind, alibi)
    ours, keep = run(flash_attn_func, (q, k, v), dout, **options)
    keep = keep[..., : lengths[0], : lengths[1]] if kind == "dropout" else None
    compare(ours, q, k, v, dout, keep=keep, **options)


@pytest.mark.parametrize(("causal", "window_size", "kind", "alibi"), COMBINATIONS)
def test_every_combination_of_features_is_right_packed(causal, window_size, kind, alibi):
    lengths_q, lengths_k, tail = (5, 14, 3, 9), (11, 6, 3, 0), 4
    total_q, total_k = sum(lengths_q) + tail, sum(lengths_k) + tail
    q, k, v, dout = (each[0].detach().requires_grad_() for each in inputs(1, total_q, total_k))
    cu_q, cu_k = offsets(lengths_q), offsets(lengths_k)
    options = options_of(causal, window_size, kind, alibi)
    more = (cu_q, cu_k, max(lengths_q), max(lengths_k))
    ours, keep = run(flash_attn_varlen_func, (q, k, v), dout, *more, **options)
    assert all((each[..., sum(lengths):, :, :] == 0).all() for each, lengths in
               zip((ours[0], *ours[2:]), (lengths_q, lengths_q, lengths_k, lengths_k), strict=True))  # fmt: skip
    found, eager, exact = (dict.fromkeys(NAMES, ()) for _ in range(3))
    for index, (length_q, length_k) in enumerate(zip(lengths_q, lengths_k, strict=True)):
        rows, keys = (slice(int(cu[index]), int(cu[index + 1])) for cu in (cu_q, cu_k))
        own = (q[None, rows], k[None, keys], v[None, keys], dout[None, rows])
        kept = keep[index, None, :, :length_q, :length_k] if kind == "dropout" else None
        parts = (ours[0][rows], ours[1][:, rows], ours[2][rows], ours[3][keys], ours[4][keys])
        for results, each in (
            (found, dict(zip(NAMES, parts, strict=True))),
            (eager, naive.results(*own, keep=kept, **options)),
            (exact, naive.oracle(*own, keep=kept, **options)),
        ):
            for name in NAMES:
                results[name] += (each[name].flatten(),)
    for name in NAMES:
        assert_close(name, *(torch.cat(results[name]) for results in (found, eager, exact)))


def test_the_gradient_of_a_query_that_sees_one_key_is_that_of_rounding():
    q, k, v, dout = inputs(1, 239, 1, heads=2, kv_heads=1, head_dim=40)
    (out, lse, dq, dk, dv), _ = run(flash_attn_func, (q, k, v), dout)
    exact = naive.oracle(q, k, v, dout)
    assert torch.equal(out, v.expand(out.shape))
    # dS = P (dP - delta): two sums of the same 40 products, of which float32 loses a unit a term, and exact is 0
    terms = (dout.float() * v.float()).abs().sum(-1).max() * k.abs().max() * 40**-0.5
    assert dq.abs().max() <= 2 * 40 * torch.finfo(torch.float32).eps * terms
    for name, found in (("lse", lse), ("dv", dv)):
        eager = naive.results(q, k, v, dout)
        assert_close(name, found, eager[name], exact[name])
    assert dk.abs().max() <= 239 * 2 * 40 * torch.finfo(torch.float32).eps * terms * q.abs().max() / k.abs().max()


UNEVEN = [((1, 239), 32), ((239, 5), 40), ((113, 203), 59), ((799, 3), 64), ((3, 799), 111), ((128, 127), 128)]
LARGE = [((113, 203), head_dim) for head_dim in (80, 96, 160, 192, 224, 256)] + [
    ((1024, 1023), 128),
    ((2048, 2048), 64),
]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("lengths", "head_dim"), UNEVEN + (LARGE if DEVICE.type == "cuda" else [((40, 50), 256)]), ids=str
)
def test_uneven_lengths_and_odd_head_dimensions_are_right(lengths, head_dim, causal, dtype):
    q, k, v, dout = inputs(1, *lengths, heads=2, kv_heads=1, head_dim=head_dim, dtype=dtype)
    ours, _ = run(flash_attn_func, (q, k, v), dout, causal=causal)
    compare(ours, q, k, v, dout, causal=causal, few_keys=lengths[1] < 10)


def test_slopes_of_each_sequence_are_its_own():
    q, k, v, dout = inputs(2, 9, 12)
    slopes = torch.tensor([SLOPES, SLOPES[::-1]], device=DEVICE)
    ours, _ = run(flash_attn_func, (q, k, v), dout, alibi_slopes=slopes, causal=True)
    compare(ours, q, k, v, dout, alibi_slopes=slopes, causal=True)


def test_large_scores_do_not_overflow():
    q, k, v, dout = inputs(2, 33, 33, kv_heads=4, dtype=torch.float16, scale=5.0)
    ours, _ = run(flash_attn_func, (q, k, v), dout)
    compare(ours, q, k, v, dout)


PACKED = {
    "qkv, dense": (flash_attn_qkvpacked_func, (2, 19, 3, 4, 16), False),
    "kv, dense": (flash_attn_kvpacked_func, (2, 19, 2, 2, 16), False),
    "qkv, packed": (flash_attn_varlen_qkvpacked_func, (19, 3, 4, 16), True),
    "kv, packed": (flash_attn_varlen_kvpacked_func, (19, 2, 2, 16), True),
}


@pytest.mark.parametrize("name", PACKED)
def test_packed_projections_give_what_their_parts_give_and_packed_gradients(name):
    function, shape, is_packed = PACKED[name]
    packed = random(*shape, seed=1)
    q = random(*shape[:-3], 4, shape[-1], seed=2) if "kv," in name and "qkv" not in name else None
    cu = offsets((4, 15))
    whole = flash_attn_varlen_func if is_packed else flash_attn_func
    more = (cu, cu, 15, 15) if is_packed else ()
    parts = [each.detach().requires_grad_() for each in (*([] if q is None else [q]), *packed.unbind(-3))]
    expected = whole(*parts, *more, 0.0, 0.3, True, (7, -1), 1.5)
    leaves = (packed,) if q is None else (q, packed)
    given = ((cu, 15) if q is None else more) if is_packed else ()
    out = function(*leaves, *given, 0.0, 0.3, True, (7, -1), 1.5)
    assert torch.equal(out, expected)
    dout = random(*out.shape, seed=3).detach()
    *_, dpacked = found = torch.autograd.grad(out, leaves, dout)
    gradients = torch.autograd.grad(expected, parts, dout)
    assert dpacked.is_contiguous() and torch.equal(dpacked, torch.stack(gradients[-shape[-3] :], -3))
    if q is not None:
        assert torch.equal(found[0], gradients[0])


def test_pages_give_what_their_keys_give_packed():
    lengths, page = (300, 17, 256), 256
    k_pages, v_pages = (random(6, page, 2, 16, seed=seed).detach() for seed in (1, 2))
    table = torch.tensor([[4, 1], [0, -1], [5, 3]], dtype=torch.int32, device=DEVICE)
    q = random(9, 4, 16, seed=3).detach()
    cu_q, cu_k = offsets((3, 2, 4)), offsets(lengths)
    k, v = (
        torch.cat([pages[row.clamp_min(0)].flatten(0, 1)[:length] for row, length in zip(table, lengths, strict=True)])
        for pages in (k_pages, v_pages)
    )
    expected = flash_attn_varlen_func(q, k, v, cu_q, cu_k, 4, 300, causal=True)
    found = flash_attn_varlen_func(q, k_pages, v_pages, cu_q, cu_k, 4, 300, causal=True, block_table=table)
    assert torch.equal(found, expected)


def test_what_is_returned_has_the_shapes_of_flash_attn():
    q, k, v, _ = inputs(2, 5, 130)
    assert isinstance(flash_attn_func(q, k, v), torch.Tensor)
    out, lse, probabilities = flash_attn_func(q, k, v, return_attn_probs=True)
    assert (out.shape, lse.shape, lse.dtype, probabilities.shape) == (q.shape, (2, 4, 5), torch.float32, (0,))
    *_, probabilities = flash_attn_func(q, k, v, 0.1, return_attn_probs=True)
    assert (probabilities.shape, probabilities.dtype) == ((2, 4, 128, 256), q.dtype)
    cu = offsets((2, 3))
    arguments = (q[0], k[0, :5], v[0, :5], cu, cu, 3, 3)
    out, lse, probabilities = flash_attn_varlen_func(*arguments, 0.1, return_attn_probs=True)
    assert (out.shape, lse.shape, probabilities.shape) == ((5, 4, 16), (4, 5), (2, 4, 128, 128))


def test_a_query_that_sees_no_key_gives_zero_an_infinite_lse_and_no_gradient():
    q, k, v, dout = inputs(1, 7, 3)
    out, lse, _ = flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    assert (out[:, :4] == 0).all() and (lse[..., :4] == torch.inf).all() and lse[..., 4:].isfinite().all()
    dq, *_ = torch.autograd.grad(out, (q, k, v), dout)
    assert (dq[:, :4] == 0).all()
    nothing = k[:, :0]
    out, lse, _ = flash_attn_func(q, nothing, nothing, return_attn_probs=True)
    assert (out == 0).all() and (lse == torch.inf).all()


def test_a_window_may_be_a_tensor_and_one_as_long_as_the_keys_is_none():
    q, k, v, _ = inputs(1, 9, 11)
    of_ints = flash_attn_func(q, k, v, window_size=(3, 2))
    assert torch.equal(flash_attn_func(q, k, v, window_size=torch.tensor([3, 2])), of_ints)
    assert torch.equal(flash_attn_func(q, k, v, window_size=(11, 400)), flash_attn_func(q, k, v))


def test_any_strides_will_do_also_of_the_gradient():
    q, k, v, dout = inputs(2, 9, 9, kv_heads=4)
    expected, _ = run(flash_attn_func, (q, k, v), dout, causal=True)
    strided = tuple(each.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for each in (q, k, v))
    backwards = torch.empty(9, 4, *dout.shape[2:], dtype=dout.dtype, device=DEVICE)[:, ::2].transpose(0, 1).copy_(dout)
    found, _ = run(flash_attn_func, strided, backwards, causal=True)
    columns = tuple(each.detach().transpose(1, 3).contiguous().transpose(1, 3).requires_grad_() for each in (q, k, v))
    copied, _ = run(flash_attn_func, columns, dout, causal=True)
    for first, second, third in zip(expected, found, copied, strict=True):
        assert torch.equal(first, second) and torch.equal(first, third)


def test_nothing_is_recorded_without_a_need():
    q, k, v, _ = inputs(1, 5, 5)
    with torch.no_grad():
        assert not flash_attn_func(q, k, v).requires_grad
    assert not flash_attn_func(q.detach(), k.detach(), v.detach()).requires_grad


BAD = {
    "q must be float16 or bfloat16, got torch.float32": {"q": torch.zeros(1, 4, 4, 16)},
    r"q must be \[batch, seqlen, heads, head_dim\], got \[4, 4, 16\]": {"q": torch.zeros(4, 4, 16).half()},
    "k must be of the dtype of q, torch.float16, got torch.bfloat16": {"k": torch.zeros(1, 4, 2, 16).bfloat16()},
    r"v must be of the shape of k, \[1, 4, 2, 16\]": {"v": torch.zeros(1, 5, 2, 16).half()},
    "k must be of the batch size of q, 1": {"k": torch.zeros(2, 4, 2, 16).half()},
    "k must be of the head dimension of q, 16": {"k": torch.zeros(1, 4, 2, 8).half()},
    "the head dimension must be from 1 to 256, got 264": {name: torch.zeros(1, 4, 2, 264).half() for name in "qkv"},
    "the heads of q must be a multiple of those of k, 3, got 4": {n: torch.zeros(1, 4, 3, 16).half() for n in "kv"},
    "k must be on the device of q, cpu, got meta": {"k": torch.zeros(1, 4, 2, 16, device="meta").half()},
    "dropout_p must be at least 0 and less than 1, got 1.0": {"dropout_p": 1.0},
    "softcap must be 0 where there is dropout, got 2.0": {"dropout_p": 0.1, "softcap": 2.0},
    "alibi_slopes must be float32, got torch.float64": {"alibi_slopes": torch.zeros(4).double()},
    r"alibi_slopes must be \[4\] or \[1, 4\], got \[2\]": {"alibi_slopes": torch.zeros(2)},
}


@pytest.mark.parametrize("error", [ValueError, RuntimeError])
@pytest.mark.parametrize("message", BAD)
def test_wrong_input_gets_one_clear_error_that_is_caught_as_either(message, error):
    arguments = {"q": torch.zeros(1, 4, 4, 16).half()} | {name: torch.zeros(1, 4, 2, 16).half() for name in "kv"}
    with pytest.raises(error, match=f"^flash_attn: {message}"):
        flash_attn_func(**arguments | BAD[message])


BAD_PACKED = {
    "cu_seqlens_q must be int32, got torch.int64": {"cu_seqlens_q": torch.tensor([0, 4])},
    r"cu_seqlens_k must be \[batch \+ 1\], got \[3\]": {"cu_seqlens_k": torch.tensor([0, 2, 4], dtype=torch.int32)},
    "the page size must be a multiple of 256, got 4": {
        "k": torch.zeros(3, 4, 2, 16).half(),
        "v": torch.zeros(3, 4, 2, 16).half(),
        "block_table": torch.zeros(1, 2, dtype=torch.int32),
    },
}


@pytest.mark.parametrize("message", BAD_PACKED)
def test_wrong_packed_input_gets_one_clear_error(message):
    cu = torch.tensor([0, 4], dtype=torch.int32)
    arguments = {
        "q": torch.zeros(4, 4, 16).half(),
        "k": torch.zeros(4, 2, 16).half(),
        "v": torch.zeros(4, 2, 16).half(),
    }
    arguments |= {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": 4, "max_seqlen_k": 4}
    with pytest.raises(ValueError, match=f"^flash_attn: {message}"):
        flash_attn_varlen_func(**arguments | BAD_PACKED[message])
