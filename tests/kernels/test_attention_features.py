"""Soft cap, sinks, ALiBi and dropout of attention, beyond the shared grid: their definition, and what dropout drops."""

import itertools

import pytest
import torch

from tilestack.kernels import attention
from tilestack.kernels.attention.dropout import dropout_mask, philox

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
OURS = ("tilestack-triton", "reference")
SEED = (2**41 + 3, 12)


def seed_on(device, seed=SEED):
    return torch.tensor(seed, device=device)


def random(*shape, dtype=torch.float64, seed=0, device="cpu"):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype).requires_grad_()


def by_definition(q, k, v, *, softcap, sinks, slopes, dropout_p):
    """out and lse of dense causal attention, spelled out: a sink is one more column of the softmax."""
    batch, length_q, heads, head_dim = q.shape
    length_k, group = k.shape[1], heads // k.shape[2]
    k, v = (each.repeat_interleave(group, 2) for each in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * head_dim**-0.5
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    distance = torch.arange(length_k) - (torch.arange(length_q)[:, None] + length_k - length_q)
    if slopes is not None:
        scores = scores - slopes.expand(batch, heads)[:, :, None, None] * distance.abs()
    scores = scores.masked_fill(distance > 0, -torch.inf)
    if sinks is not None:
        column = sinks[None, :, None, None].expand(batch, heads, length_q, 1)
        scores = torch.cat([scores, column], -1)
    probabilities = torch.softmax(scores, -1)[..., :length_k]
    if dropout_p:
        keep = dropout_mask(seed_on("cpu"), dropout_p, batch, heads, length_q, length_k)
        probabilities = probabilities * keep / (1 - dropout_p)
    return torch.einsum("bhij,bjhd->bihd", probabilities, v), torch.logsumexp(scores, -1)


@pytest.mark.parametrize("slopes", [None, (4,), (2, 4)], ids=str)
@pytest.mark.parametrize(
    ("softcap", "with_sinks", "dropout_p"), list(itertools.product((0.0, 2.0), (False, True), (0, 0.3)))
)
def test_the_reference_is_its_definition(softcap, with_sinks, slopes, dropout_p):
    q, k, v = random(2, 7, 4, 8), random(2, 9, 2, 8, seed=1), random(2, 9, 2, 8, seed=2)
    sinks = random(4, seed=3) if with_sinks else None
    slopes = None if slopes is None else random(*slopes, seed=4).detach().abs()
    shared = {"softcap": softcap, "sinks": sinks, "dropout_p": dropout_p}
    ours = attention(q, k, v, causal=True, alibi_slopes=slopes, dropout_seed=seed_on("cpu"), return_lse=True, **shared)
    theirs = by_definition(q, k, v, slopes=slopes, **shared)
    torch.testing.assert_close(ours, theirs)
    leaves = [each for each in (q, k, v, sinks) if each is not None]
    dout = random(*q.shape, seed=5).detach()
    found, expected = (torch.autograd.grad(out, leaves, dout) for out in (ours[0], theirs[0]))
    torch.testing.assert_close(found, expected)


def test_philox_gives_the_known_answers_of_its_authors_for_seven_rounds():
    pi = (0xA4093822, 0x299F31D0, 0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    answers = {
        (0,) * 6: (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48),
        (2**32 - 1,) * 6: (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662),
        pi: (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A),
    }
    for given, answer in answers.items():
        assert tuple(int(word) for word in philox(*map(torch.tensor, given))) == answer


@pytest.mark.parametrize("dropout_p", [0.001, 0.1, 0.5, 0.9])
def test_dropout_drops_as_much_as_it_should_and_no_two_positions_alike(dropout_p):
    mask = dropout_mask(seed_on("cpu"), dropout_p, 2, 3, 200, 301).double()
    deviation = (dropout_p * (1 - dropout_p) / mask.numel()) ** 0.5
    assert abs((1 - mask).mean().item() - dropout_p) < 5 * deviation
    flat = (mask - mask.mean()).reshape(6 * 200, 301)
    for shift in (1, 2, 4, 8):  # keys within a call of Philox and next to it; queries and heads
        for pairs in (flat[:, shift:] * flat[:, :-shift], flat[shift:] * flat[:-shift]):
            assert abs(pairs.mean().item()) < 5 * dropout_p * (1 - dropout_p) / pairs.numel() ** 0.5


def test_the_mask_of_a_document_is_that_of_its_number():
    whole = dropout_mask(seed_on("cpu"), 0.5, 3, 2, 9, 20)
    assert torch.equal(dropout_mask(seed_on("cpu"), 0.5, 1, 2, 9, 20, first=2), whole[2:])
    assert torch.equal(dropout_mask(seed_on("cpu"), 0.5, 3, 2, 9, 13), whole[..., :13])
    for other in ((SEED[0] + 1, SEED[1]), (SEED[0] + 2**32, SEED[1]), (SEED[0], SEED[1] + 1)):
        assert 0.4 < (dropout_mask(seed_on("cpu", other), 0.5, 3, 2, 9, 20) == whole).double().mean() < 0.6


@pytest.mark.parametrize("implementation", OURS)
def test_what_an_implementation_drops_can_be_read_off_its_output(implementation):
    """With q = 0 all probabilities are 1 / Sk, and with v the unit matrix the output is the mask."""
    length = 40
    q = torch.zeros(2, 50, 4, length, device=DEVICE)
    v = torch.eye(length, device=DEVICE)[:, None].expand(2, length, 2, length)
    out = attention(q, v, v, dropout_p=0.3, dropout_seed=seed_on(DEVICE), implementation=implementation)
    mask = dropout_mask(seed_on(DEVICE), 0.3, 2, 4, 50, length)
    torch.testing.assert_close(out.transpose(1, 2), mask / (0.7 * length))


@pytest.mark.parametrize("implementation", OURS)
def test_without_a_seed_dropout_follows_torchs_and_draws_anew_at_each_call(implementation):
    q = random(1, 20, 2, 16, dtype=torch.float32, device=DEVICE)

    def run():
        return attention(q, q, q, dropout_p=0.4, implementation=implementation)

    torch.manual_seed(3)
    first, second = run(), run()
    torch.manual_seed(3)
    assert torch.equal(run(), first) and not torch.equal(first, second)


def documents(*lengths):
    tokens = sum(lengths)
    q, k, v = (random(tokens, 2, 16, dtype=torch.float32, seed=seed, device=DEVICE) for seed in range(3))
    cu = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=DEVICE)
    slopes = random(len(lengths), 2, dtype=torch.float32, seed=4, device=DEVICE).detach().abs()
    sinks = random(2, dtype=torch.float32, seed=5, device=DEVICE)
    tensors = {"q": q, "k": k, "v": v, "cu_seqlens_q": cu, "cu_seqlens_k": cu, "sinks": sinks, "alibi_slopes": slopes}
    return tensors | {"dropout_seed": seed_on(DEVICE), "softcap": 2.0, "dropout_p": 0.2, "causal": True}


@pytest.mark.parametrize("implementation", OURS)
def test_equal_documents_give_what_a_dense_batch_gives(implementation):
    arguments = documents(17, 17, 17)
    packed = attention(**arguments, implementation=implementation)
    dense = dict(arguments)
    for name in ("cu_seqlens_q", "cu_seqlens_k"):
        del dense[name]
    dense |= {name: arguments[name].view(3, 17, 2, 16) for name in "qkv"}
    out = attention(**dense, implementation=implementation)
    torch.testing.assert_close(out.flatten(0, 1), packed)
    leaves = [arguments[name] for name in ("q", "k", "v", "sinks")]
    found = (torch.autograd.grad(each.square().sum(), leaves) for each in (out, packed))
    torch.testing.assert_close(*found)


def test_attention_with_every_feature_never_waits_for_the_device(monkeypatch):
    arguments = documents(20, 0, 12)
    arguments["dropout_seed"] = None

    def fail(*_):
        raise AssertionError("a value of a tensor was read on the host")

    for reader in ("item", "tolist", "__bool__", "__int__", "__index__"):
        monkeypatch.setattr(torch.Tensor, reader, fail)
    if DEVICE.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        out = attention(**arguments, implementation="tilestack-triton")
        torch.autograd.grad(out, [arguments[name] for name in ("q", "k", "v", "sinks")], torch.ones_like(out))
    finally:
        if DEVICE.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("implementation", OURS)
def test_attention_with_every_feature_compiles_into_one_graph(implementation):
    arguments = documents(9, 5)
    leaves = [arguments[name] for name in ("q", "k", "v", "sinks")]

    def run():
        return attention(**arguments, implementation=implementation)

    expected, found = run(), torch.compile(run, fullgraph=True, backend="aot_eager")()
    assert torch.equal(found, expected)
    for pair in zip(torch.autograd.grad(found.sum(), leaves), torch.autograd.grad(expected.sum(), leaves), strict=True):
        assert torch.equal(*pair)


@pytest.mark.parametrize("implementation", ["triton", "reference"])
def test_the_custom_op_with_every_feature_is_registered_as_torch_wants_it(implementation):
    arguments = documents(9, 5)
    names = ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "sinks", "alibi_slopes", "dropout_seed")
    op = getattr(torch.ops.tilestack, f"attention_forward_{implementation}").default
    numbers = (0.3, True, -1, 0, -1, -1, False, 2.0, 0.2, False)
    torch.library.opcheck(op, (*[arguments[name] for name in names], *numbers))


@pytest.mark.parametrize("wanted", [("sinks",), ("q",), ("v", "sinks")], ids=str)
def test_gradients_asked_for_alone_are_those_asked_for_together(wanted):
    arguments = documents(9, 5)
    names = ("q", "k", "v", "sinks")
    together = dict(zip(names, _gradients(arguments, names), strict=True))
    for name, gradient in zip(wanted, _gradients(arguments, wanted), strict=True):
        assert torch.equal(gradient, together[name])


def _gradients(arguments, names):
    leaves = {name: arguments[name].detach().requires_grad_(name in names) for name in ("q", "k", "v", "sinks")}
    out = attention(**arguments | leaves, implementation="tilestack-triton")
    return torch.autograd.grad(out.square().sum(), [leaves[name] for name in names])


def test_slopes_get_no_gradient():
    arguments = documents(5)
    arguments["alibi_slopes"] = arguments["alibi_slopes"].requires_grad_()
    attention(**arguments).sum().backward()
    assert arguments["alibi_slopes"].grad is None and arguments["sinks"].grad is not None


Q = torch.zeros(2, 5, 4, 8)
CU = torch.tensor([0, 2, 5], dtype=torch.int32)
BAD = {
    "softcap must be a finite number, 0 .* or more, got -1": {"softcap": -1},
    "softcap must be a finite number, 0 .* or more, got nan": {"softcap": float("nan")},
    "softcap must be a finite number, 0 .* or more, got inf": {"softcap": float("inf")},
    "sinks must be a tensor, got list": {"sinks": [0.0] * 4},
    "softcap must be a number, got str": {"softcap": "50"},
    "softcap must be a number, got Tensor": {"softcap": torch.tensor(50.0)},
    r"sinks must be \[4\] \(one for each head of q\), got \[2\]": {"sinks": torch.zeros(2)},
    "sinks must be floating point, got torch.int64": {"sinks": torch.zeros(4, dtype=torch.int64)},
    r"sinks must have the device of q \(cpu\), got meta": {"sinks": torch.zeros(4, device="meta")},
    "alibi_slopes must be torch.float32, got torch.float16": {"alibi_slopes": torch.zeros(4).half()},
    r"alibi_slopes must be \[4\] .*, got \[5\]": {"alibi_slopes": torch.zeros(5)},
    r"alibi_slopes must be \[2, 4\] .*, got \[3, 4\]": {"alibi_slopes": torch.zeros(3, 4)},
    r"alibi_slopes must be \[Hq\], .* got 0 dimensions": {"alibi_slopes": torch.zeros(())},
    r"alibi_slopes must have the device of q \(cpu\), got meta": {"alibi_slopes": torch.zeros(4, device="meta")},
    "dropout_p must be at least 0 and less than 1, got 1": {"dropout_p": 1},
    "dropout_p must be at least 0 and less than 1, got -0.1": {"dropout_p": -0.1},
    "dropout_p must be at least 0 and less than 1, got nan": {"dropout_p": float("nan")},
    "dropout_p must be a number, got bool": {"dropout_p": True},
    "dropout_seed must be torch.int64, got torch.float32": {"dropout_seed": torch.zeros(2)},
    r"dropout_seed must be \[2\] \(seed and offset\), got \[3\]": {"dropout_seed": torch.zeros(3, dtype=torch.int64)},
    r"dropout_seed must have the device of q \(cpu\), got meta": {
        "dropout_seed": torch.zeros(2, dtype=torch.int64, device="meta")
    },
}


@pytest.mark.parametrize("message", BAD)
def test_wrong_input_gets_one_clear_error(message):
    with pytest.raises(ValueError, match=f"^attention: {message}"):
        attention(Q, Q, Q, **BAD[message])


def test_small_tensors_of_any_stride_are_read_right():
    arguments = documents(20, 13)
    expected = attention(**arguments, implementation="tilestack-triton")
    for name in ("cu_seqlens_q", "cu_seqlens_k", "sinks", "alibi_slopes", "dropout_seed"):
        arguments[name] = torch.stack([arguments[name], torch.full_like(arguments[name], 7)], -1)[..., 0]
        assert not arguments[name].is_contiguous()
    assert torch.equal(attention(**arguments, implementation="tilestack-triton"), expected)


def test_packed_slopes_are_one_row_a_document():
    packed = {"q": Q[0], "k": Q[0], "v": Q[0], "cu_seqlens_q": CU, "cu_seqlens_k": CU}
    with pytest.raises(ValueError, match=r"alibi_slopes must be \[2, 4\] .*, got \[3, 4\]"):
        attention(**packed, alibi_slopes=torch.zeros(3, 4))
    assert attention(**packed, alibi_slopes=torch.zeros(2, 4)).shape == (5, 4, 8)
