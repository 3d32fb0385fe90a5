"""What other projects import: ops without autograd that write to given tensors, and dropout that is replayed."""

import naive_attention as naive
import pytest
import torch
from naive_attention import DEVICE, random
from test_flash_attention import NAMES, compare, inputs, offsets

from tilestack.compat.flash_attn import flash_attn_func, flash_attn_varlen_func
from tilestack.compat.flash_attn import flash_attn_interface as interface
from tilestack.testing.compare import assert_close

PLAIN = {"softmax_scale": 0.25, "window_size_left": -1, "window_size_right": -1, "softcap": 0.0, "alibi_slopes": None}


def forward(q, k, v, *, dropout_p=0.0, causal=False, return_softmax=False, **options):
    return interface._flash_attn_forward(
        q, k, v, dropout_p=dropout_p, causal=causal, return_softmax=return_softmax, **PLAIN | options
    )


def backward(dout, q, k, v, out, lse, *, dropout_p=0.0, causal=False, deterministic=False, rng_state=None, **options):
    dq, dk, dv = (torch.full_like(each, torch.nan) for each in (q, k, v))
    softmax_d = interface._flash_attn_backward(
        dout, q, k, v, out, lse, dq, dk, dv, dropout_p=dropout_p, causal=causal, deterministic=deterministic,
        rng_state=rng_state, **PLAIN | options,
    )  # fmt: skip
    return dq, dk, dv, softmax_d


def detached(*tensors):
    return [each.detach() for each in tensors]


def test_the_pair_gives_what_autograd_gives():
    q, k, v, dout = inputs(2, 13, 21, head_dim=12)
    out, lse, _ = flash_attn_func(q, k, v, causal=True, softmax_scale=0.25, return_attn_probs=True)
    expected = (out, lse, *torch.autograd.grad(out, (q, k, v), dout))
    plain = detached(q, k, v)
    out, lse, probabilities, rng_state = forward(*plain, causal=True)
    *gradients, softmax_d = backward(dout, *plain, out, lse, causal=True)
    for name, found, wanted in zip(NAMES, (out, lse, *gradients), expected, strict=True):
        assert torch.equal(found, wanted), name
    assert probabilities.numel() == 0 and (rng_state.shape, rng_state.dtype) == ((2,), torch.int64)
    assert (softmax_d.shape, softmax_d.dtype) == ((2, 4, 128), torch.float32)
    expected_d = (dout.float() * out.float()).sum(-1).transpose(1, 2)
    torch.testing.assert_close(softmax_d[..., :13], expected_d)


def test_nothing_is_recorded_even_if_the_inputs_want_a_gradient():
    q, k, v, _ = inputs(1, 5, 5)
    assert not any(each.requires_grad for each in forward(q, k, v)[:2])


def test_gradients_are_written_into_strided_views_and_none_is_made_anew():
    q, k, v, dout = inputs(1, 9, 9, kv_heads=4)
    plain = detached(q, k, v)
    out, lse, *_ = forward(*plain, causal=True)
    *expected, _ = backward(dout, *plain, out, lse, causal=True)
    packed = torch.full((1, 9, 3, 4, 16), torch.nan, dtype=q.dtype, device=DEVICE)
    scalars = (0.0, 0.25, True, -1, -1, 0.0)
    interface._flash_attn_backward(dout, *plain, out, lse, *packed.unbind(2), *scalars, None, False)
    assert torch.equal(packed, torch.stack(expected, 2))
    *found, _ = interface.flash_attn_gpu.bwd(dout, *plain, out, lse, None, None, None, None, *scalars, False)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    buffer = torch.empty_like(out)
    results = interface.flash_attn_gpu.fwd(*plain, buffer, None, *scalars, False)
    assert results[0] is buffer and torch.equal(buffer, out)


def test_backward_of_a_part_of_the_keys_is_its_share_as_in_ring_attention():
    q, k, v, dout = inputs(1, 12, 20)
    plain_q, plain_k, plain_v = detached(q, k, v)
    parts = [(plain_k[:, rows], plain_v[:, rows]) for rows in (slice(0, 7), slice(7, 20))]
    forwards = [forward(plain_q, *part)[:2] for part in parts]
    lse = torch.stack([each for _, each in forwards]).logsumexp(0)
    weights = [(each - lse).exp().transpose(1, 2)[..., None] for _, each in forwards]
    out = sum(weight * each for weight, (each, _) in zip(weights, forwards, strict=True)).to(q.dtype)
    gradients = [backward(dout, plain_q, *part, out, lse)[:3] for part in parts]
    dq = sum(each[0].float() for each in gradients).to(q.dtype)
    dk, dv = (torch.cat([each[index] for each in gradients], 1) for index in (1, 2))
    compare((out, lse, dq, dk, dv), q, k, v, dout, softmax_scale=0.25)


def test_ring_attention_of_packed_documents_is_right_too():
    cu_q, cu_k = offsets((5, 7)), offsets((4, 6))
    q, k, v, dout = (each[0] for each in inputs(1, 12, 20))
    plain_q, plain_k, plain_v = detached(q, k, v)
    scalars = {"max_seqlen_q": 7, "max_seqlen_k": 6, "dropout_p": 0.0, "causal": False, **PLAIN}
    own = [torch.arange(0, 10, device=DEVICE), torch.arange(10, 20, device=DEVICE)]
    results = [
        interface._flash_attn_varlen_forward(plain_q, plain_k[rows], plain_v[rows], cu_q, cu_k, **scalars)[:2]
        for rows in own
    ]
    lse = torch.stack([each for _, each in results]).logsumexp(0)
    out = sum((part - lse).exp().T[..., None] * each for each, part in results).to(q.dtype)
    dq, dk, dv = torch.zeros_like(q, dtype=torch.float32), torch.empty_like(k), torch.empty_like(v)
    for rows in own:
        part = [torch.empty_like(each) for each in (plain_q, plain_k[rows], plain_v[rows])]
        softmax_d = interface._flash_attn_varlen_backward(
            dout, plain_q, plain_k[rows], plain_v[rows], out, lse, *part, cu_q, cu_k, deterministic=False, **scalars
        )
        dq += part[0].float()
        dk[rows], dv[rows] = part[1:]
    assert (softmax_d.shape, softmax_d.dtype) == ((4, 12 + 2 * 128), torch.float32)
    for index in range(2):
        queries = slice(*cu_q[index : index + 2].tolist())
        keys = torch.cat([rows[slice(*cu_k[index : index + 2].tolist())] for rows in own])
        ours = (out[queries], lse[:, queries], dq[queries].to(q.dtype), dk[keys], dv[keys])
        inner = (q[queries], k[keys], v[keys], dout[queries])
        compare([each[None] for each in ours], *(each[None] for each in inner), softmax_scale=0.25)


def test_backward_drops_what_forward_dropped_and_needs_to_be_told():
    q, k, v, dout = inputs(2, 30, 40)
    plain = detached(q, k, v)
    torch.manual_seed(3)
    out, lse, probabilities, rng_state = forward(*plain, dropout_p=0.3, return_softmax=True)
    *gradients, _ = backward(dout, *plain, out, lse, dropout_p=0.3, rng_state=rng_state)
    keep = ~torch.signbit(probabilities[..., :30, :40])
    assert 0.6 < keep.float().mean() < 0.8
    options = {"softmax_scale": 0.25, "keep": keep, "dropout_p": 0.3}
    compare((out, lse, *gradients), q, k, v, dout, **options)
    with pytest.raises(RuntimeError, match="rng_state must be that of the forward pass, got None"):
        backward(dout, *plain, out, lse, dropout_p=0.3)
    with pytest.raises(RuntimeError, match="return_softmax must be False where there is no dropout"):
        forward(*plain, return_softmax=True)


def test_the_pair_compiles_into_one_graph():
    plain = detached(*inputs(1, 6, 9)[:3])

    def both(q, k, v):
        out, lse, _, rng_state = forward(q, k, v, dropout_p=0.2, causal=True)
        return out, *backward(out, q, k, v, out, lse, dropout_p=0.2, causal=True, rng_state=rng_state)

    results = []
    for function in (both, torch.compile(both, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(1)
        results.append(function(*plain))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_a_generator_of_ones_own_fixes_what_is_dropped():
    plain = detached(*inputs(1, 20, 20)[:3])

    def run(seed):
        generator = torch.Generator(DEVICE).manual_seed(seed)
        return interface.flash_attn_gpu.fwd(*plain, None, None, 0.3, 0.25, False, -1, -1, 0.0, False, generator)

    assert torch.equal(run(1)[0], run(1)[0]) and torch.equal(run(1)[3], run(1)[3])
    assert not torch.equal(run(1)[0], run(2)[0])


@pytest.mark.parametrize("given", ["seqused_k", "leftpad_k", "both"])
def test_keys_that_are_not_used_and_padding_on_the_left_are_not_seen(given):
    q, k, v, _ = (each[0].detach() for each in inputs(1, 9, 20))
    cu_q, cu_k = offsets((4, 5)), offsets((12, 8))
    used, pad = {"seqused_k": ([7, 8], [0, 0]), "leftpad_k": ([12, 8], [3, 1]), "both": ([9, 7], [2, 3])}[given]
    integers = {
        "seqused_k": torch.tensor(used, dtype=torch.int32, device=DEVICE) if given != "leftpad_k" else None,
        "leftpad_k": torch.tensor(pad, dtype=torch.int32, device=DEVICE) if given != "seqused_k" else None,
    }
    shared = {"dropout_p": 0.0, "softmax_scale": 0.25, "causal": True}
    out, *_ = interface._flash_attn_varlen_forward(q, k, v, cu_q, cu_k, 5, 12, **shared, **integers)
    rows = [torch.arange(start + skip, start + end) for start, skip, end in zip((0, 12), pad, used, strict=True)]
    seen = torch.cat(rows).to(DEVICE)
    inner = offsets([len(each) for each in rows])
    expected = flash_attn_varlen_func(q, k[seen], v[seen], cu_q, inner, 5, 12, 0.0, 0.25, True)
    assert torch.equal(out, expected)


def test_s_dmask_is_what_the_block_size_makes_probabilities_of():
    """As flash-attn's own suite rebuilds them: with block maxima from the last block of keys to the first."""
    q, k, v, _ = inputs(1, 6, 300, heads=2, kv_heads=2, head_dim=72)
    torch.manual_seed(0)
    _, lse, found = flash_attn_func(q, k, v, 0.17, causal=True, return_attn_probs=True)
    block = interface._get_block_size_n(q.device, 72, True, True)
    assert block == 64
    exact = naive.scores(q.double(), k.double(), causal=True).detach()
    largest = torch.stack([part.amax(-1) for part in exact.split(block, -1)], -1)
    met = largest.flip(-1).cummax(-1).values.flip(-1).repeat_interleave(block, -1)[..., :300]
    rebuilt = found[..., :6, :300].abs().double() * (met - exact.logsumexp(-1, keepdim=True)).exp()
    probabilities = exact.softmax(-1)
    rounded = (exact - met).exp().to(q.dtype).double() * (met - exact.logsumexp(-1, keepdim=True)).exp()
    assert_close("probabilities", rebuilt.cpu(), rounded.cpu(), probabilities.cpu())


@pytest.mark.parametrize(
    ("head_dim", "is_dropout", "is_causal", "expected"),
    [(32, True, False, 128), (64, False, False, 128), (64, True, True, 64), (96, False, True, 64),
     (128, False, True, 64), (128, True, True, 32), (192, True, False, 64), (256, False, False, 64)],
)  # fmt: skip
def test_the_block_sizes_are_flash_attns(head_dim, is_dropout, is_causal, expected):
    assert interface._get_block_size_n(torch.device("cpu"), head_dim, is_dropout, is_causal) == expected


def test_the_small_helpers():
    x = random(4, 6).detach()
    assert interface.maybe_contiguous(x) is x and interface.maybe_contiguous(None) is None
    assert interface.maybe_contiguous(x.T).is_contiguous()
    assert [interface.round_multiple(each, 128) for each in (0, 1, 128, 129)] == [0, 128, 128, 256]
