"""attention beyond the shared grid: the reference itself, errors, isolation of documents, compilation, huge offsets."""

import itertools

import pytest
import torch
import torch.nn.functional as F  # noqa: N812  (torch's own habit)

from tilestack.kernels import attention
from tilestack.kernels.attention.op import _prepare
from tilestack.testing import compare

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
OURS = ("tilestack-triton", "reference")


def random(*shape, dtype=torch.float32, seed=0, device=DEVICE):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype).requires_grad_()


def offsets(*lengths):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=DEVICE)


def packed(*lengths, heads=(4, 2), head_dim=16):
    tokens = sum(lengths)
    q, k, v = (random(tokens, heads[side > 0], head_dim, seed=side) for side in range(3))
    return {"q": q, "k": k, "v": v, "cu_seqlens_q": offsets(*lengths), "cu_seqlens_k": offsets(*lengths)}


def results(arguments, **options):
    """out, lse, dq, dk, dv."""
    out, lse = attention(**arguments, **options, return_lse=True)
    dout = random(*out.shape, dtype=out.dtype, seed=7).detach()
    return out, lse, *torch.autograd.grad(out, [arguments[name] for name in "qkv"], dout)


@pytest.mark.parametrize("window", [(-1, 0), (-1, -1), (300, 20)], ids=str)
def test_deterministic_gradients_have_the_same_bits_each_time(window):
    on_gpu = DEVICE.type == "cuda"
    length, head_dim, repeats = (2000, 128, 70) if on_gpu else (40, 16, 1)
    q, k, v = (random(2, length, n, head_dim, dtype=torch.bfloat16, seed=n) for n in (8, 2, 2))
    out = attention(q, k, v, window_size=window, deterministic=True)
    dout = random(*out.shape, dtype=out.dtype, seed=7).detach()
    first, *others = (torch.autograd.grad(out, (q, k, v), dout, retain_graph=True) for _ in range(1 + repeats))
    assert all(torch.equal(*pair) for other in others for pair in zip(first, other, strict=True))


@pytest.mark.parametrize("causal", [False, True])
def test_the_reference_agrees_with_torchs_own_attention_in_float64(causal):
    q, k, v = (random(2, 9, heads, 8, dtype=torch.float64, seed=heads, device="cpu") for heads in (4, 2, 2))
    ours = attention(q, k, v, causal=causal, implementation="reference")
    transposed = (each.transpose(1, 2) for each in (q, k, v))
    theirs = F.scaled_dot_product_attention(*transposed, is_causal=causal, enable_gqa=True).transpose(1, 2)
    torch.testing.assert_close(ours, theirs)
    dout = torch.randn_like(ours)
    for mine, expected in zip(
        torch.autograd.grad(ours, (q, k, v), dout), torch.autograd.grad(theirs, (q, k, v), dout), strict=True
    ):
        torch.testing.assert_close(mine, expected)


@pytest.mark.parametrize(
    ("lengths", "options"),
    [
        ((5, 7), {"causal": True}),
        ((7, 4), {"causal": True}),
        ((6, 8), {"window_size": (2, 1), "softmax_scale": 0.7}),
        ((8, 3), {"window_size": (1, -1)}),
    ],
)
def test_the_references_gradients_and_lse_are_those_of_its_definition(lengths, options):
    q, k, v = (random(1, lengths[side > 0], 2, 4, dtype=torch.float64, seed=side, device="cpu") for side in range(3))

    def run(q, k, v):
        return attention(q, k, v, **options, implementation="reference")

    assert torch.autograd.gradcheck(run, (q, k, v))
    left, right = options.get("window_size", (-1, 0))
    own = torch.arange(lengths[0])[:, None] + lengths[1] - lengths[0]
    keys = torch.arange(lengths[1])
    seen = (left < 0) | (keys >= own - left)
    seen &= (torch.tensor(right) < 0) | (keys <= own + right)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * options.get("softmax_scale", 0.5)
    expected = torch.logsumexp(scores.masked_fill(~seen, -torch.inf), -1)
    lse = attention(q, k, v, **options, return_lse=True, implementation="reference")[1]
    torch.testing.assert_close(lse, expected)


@pytest.mark.parametrize("implementation", OURS)
def test_a_change_in_one_document_leaves_the_bits_of_the_others(implementation):
    arguments = packed(20, 37, 0, 12)
    before = results(arguments, causal=True, implementation=implementation)
    inside = slice(20, 57)
    for name in "qkv":
        arguments[name].data[inside] += 1
    after = results(arguments, causal=True, implementation=implementation)
    for old, new in zip(before, after, strict=True):
        rows = 1 if old.dim() == 2 else 0  # lse is [Hq, Tq]
        same = (old == new).movedim(rows, 0).flatten(1).all(1)
        assert same[:20].all() and same[57:].all()
        assert not same[inside].all()


@pytest.mark.parametrize("implementation", OURS)
def test_the_same_input_gives_the_same_bits(implementation):
    arguments = packed(70, 3, 33)
    first, second = (results(arguments, causal=True, implementation=implementation) for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


def test_documents_give_what_each_gives_alone():
    arguments = packed(20, 37, 12)
    together = results(arguments, causal=True, implementation="tilestack-triton")
    for start, end in itertools.pairwise(arguments["cu_seqlens_q"].tolist()):
        alone = {name: arguments[name][None, start:end].detach().requires_grad_() for name in "qkv"}
        out = attention(**alone, causal=True, implementation="tilestack-triton")
        torch.testing.assert_close(out[0], together[0][start:end])


def test_packed_attention_never_waits_for_the_device(monkeypatch):
    arguments = packed(20, 37, 0, 12)
    dout = torch.ones_like(arguments["q"])

    def fail(*_):
        raise AssertionError("a value of a tensor was read on the host")

    for reader in ("item", "tolist", "__bool__", "__int__", "__index__"):
        monkeypatch.setattr(torch.Tensor, reader, fail)
    if DEVICE.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        out = attention(**arguments, causal=True, implementation="tilestack-triton")
        torch.autograd.grad(out, [arguments[name] for name in "qkv"], dout)
    finally:
        if DEVICE.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("implementation", OURS)
@pytest.mark.parametrize("layout", ["dense", "packed"])
def test_it_compiles_into_one_graph(implementation, layout):
    arguments = packed(20, 13)
    if layout == "dense":
        arguments = {name: arguments[name].detach()[None].requires_grad_() for name in "qkv"}

    def run(arguments):
        return attention(**arguments, causal=True, window_size=(9, -1), implementation=implementation)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    expected, found = run(arguments), compiled(arguments)
    assert torch.equal(found, expected)
    leaves = [arguments[name] for name in "qkv"]
    for pair in zip(torch.autograd.grad(found.sum(), leaves), torch.autograd.grad(expected.sum(), leaves), strict=True):
        assert torch.equal(*pair)


@pytest.mark.parametrize("implementation", ["triton", "reference"])
def test_the_custom_op_is_registered_as_torch_wants_it(implementation):
    arguments = packed(9, 0, 5)
    for tensors in (
        [arguments[name] for name in ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k")],
        [*(arguments[name].detach()[None].requires_grad_() for name in "qkv"), None, None],
    ):
        op = getattr(torch.ops.tilestack, f"attention_forward_{implementation}").default
        torch.library.opcheck(op, (*tensors, None, None, None, 0.3, True, -1, 0, -1, -1, False, 0.0, 0.0, False))


def test_lse_carries_no_gradient():
    arguments = packed(5, 6)
    out, lse = attention(**arguments, return_lse=True)
    assert out.requires_grad and not lse.requires_grad


def test_the_triton_kernels_say_which_head_dimensions_they_take():
    q = random(1, 4, 2, 257)
    with pytest.raises(ValueError, match="head dimensions up to 256, got 257"):
        attention(q, q, q, implementation="tilestack-triton")
    assert attention(q, q, q, implementation="reference").shape == q.shape


def _zeros(*shape, **options):
    return torch.zeros(shape, **options)


DENSE = {"q": _zeros(2, 5, 4, 8), "k": _zeros(2, 6, 2, 8), "v": _zeros(2, 6, 2, 8)}
CU = torch.tensor([0, 2, 5], dtype=torch.int32)
PACKED = {"q": _zeros(5, 4, 8), "k": _zeros(5, 2, 8), "v": _zeros(5, 2, 8), "cu_seqlens_q": CU, "cu_seqlens_k": CU}
BAD = {
    "q must be floating point, got torch.int64": {"q": _zeros(2, 5, 4, 8, dtype=torch.int64)},
    "q must have 16 bits or more a number, got torch.float8": {"q": DENSE["q"].to(torch.float8_e4m3fn)},
    "k must be a tensor, got NoneType": {"k": None},
    r"k must have the dtype of q \(torch.float32\), got torch.float16": {"k": DENSE["k"].half()},
    r"v must have the device of q \(cpu\), got meta": {"v": DENSE["v"].to("meta")},
    r"q must be \[B, Sq, Hq, D\], or packed \[Tq, Hq, D\], got 2 dimensions": {"q": _zeros(5, 8)},
    r"k must be \[B, Sk, Hkv, D\] like q, .* got 3 dimensions": {"k": _zeros(6, 2, 8)},
    r"k must be \[2, 6, 2, 8\] \(the head dimension of q\)": {"k": _zeros(2, 6, 2, 16)},
    r"v must be \[2, 6, 2, 8\] \(the shape of k\)": {"v": _zeros(2, 7, 2, 8)},
    r"k must be \[2, 6, 2, 8\] \(the batch size of q\)": {"k": _zeros(1, 6, 2, 8), "v": _zeros(1, 6, 2, 8)},
    r"q must have a multiple of the heads of k \(3\), got 4": {"k": _zeros(2, 6, 3, 8), "v": _zeros(2, 6, 3, 8)},
    "the head dimension of q must be at least 1, got 0": {name: _zeros(2, 5, 2, 0) for name in "qkv"},
    "window_size must be at least -1, got -2": {"window_size": (-2, 0)},
    "window_size must be two integers": {"window_size": 4},
    "window_size must be an integer, got float": {"window_size": (1.5, 0)},
    "window_size must be an integer, got str": {"window_size": (1, "0")},
    "softmax_scale must be a finite number greater than 0, got '1'": {"softmax_scale": "1"},
    "deterministic must be True, False or 'keys', got 'yes'": {"deterministic": "yes"},
    "softmax_scale must be a finite number greater than 0, got 0": {"softmax_scale": 0},
    "softmax_scale must be a finite number greater than 0, got inf": {"softmax_scale": float("inf")},
    "cu_seqlens_k belongs to packed input": {"cu_seqlens_k": CU},
    "max_seqlen_q belongs to packed input": {"max_seqlen_q": 5},
    r"implementation='tilestak-triton' is not one of .*; did you mean": {"implementation": "tilestak-triton"},
}
BAD_PACKED = {
    "cu_seqlens_q is missing": {"cu_seqlens_q": None},
    "cu_seqlens_k is missing": {"cu_seqlens_k": None},
    "cu_seqlens_q must be a tensor, got list": {"cu_seqlens_q": [0, 2, 5]},
    "cu_seqlens_k must be torch.int32, got torch.int64": {"cu_seqlens_k": CU.long()},
    r"cu_seqlens_q must have the device of q \(cpu\), got meta": {"cu_seqlens_q": CU.to("meta")},
    r"cu_seqlens_q must be \[n \+ 1\], got 2 dimensions": {"cu_seqlens_q": CU[None]},
    "the length of cu_seqlens_q must be at least 1, got 0": {"cu_seqlens_q": CU[:0]},
    r"cu_seqlens_k must be \[3\] \(as many as cu_seqlens_q\), got \[2\]": {"cu_seqlens_k": CU[:2]},
    "max_seqlen_q must be an integer, got Tensor": {"max_seqlen_q": torch.tensor(3)},
    "max_seqlen_k must be at least 0, got -1": {"max_seqlen_k": -1},
}


@pytest.mark.parametrize(
    ("message", "arguments"),
    [(message, DENSE | wrong) for message, wrong in BAD.items()]
    + [(message, PACKED | wrong) for message, wrong in BAD_PACKED.items()],
)
def test_wrong_input_gets_one_clear_error(message, arguments):
    with pytest.raises(ValueError, match=f"^attention: {message}"):
        attention(**arguments)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU with 60 GB")
def test_offsets_beyond_32_bits_are_right():
    length, heads, sampled, window = 65_600, 256, 200, 64
    generator = torch.Generator(DEVICE).manual_seed(0)
    full = [
        torch.randn((1, length, heads, 128), generator=generator, device=DEVICE, dtype=torch.bfloat16).requires_grad_()
        for _ in range(3)
    ]
    dout = torch.randn(full[0].shape, generator=generator, device=DEVICE, dtype=torch.bfloat16)
    assert full[0].numel() > 2**31

    def end(tensor, rows):
        return tensor[:, -rows:, -2:].detach().clone().requires_grad_()

    def run(q, k, v, dout, implementation):
        out = attention(q, k, v, window_size=(window, 0), implementation=implementation)
        dq, dk, dv = torch.autograd.grad(out, (q, k, v), dout)
        return [each[:, -sampled:, -2:].detach() for each in (out, dq, dk, dv)]  # their queries and keys are all there

    ours = run(*full, dout, "tilestack-triton")
    part = [end(full[0], sampled), *(end(each, sampled + window) for each in full[1:]), end(dout, sampled).detach()]
    eager = run(*part, "reference")
    exact = run(*(each.detach().cpu().double().requires_grad_() for each in part), "reference")
    for name, *each in zip(("out", "dq", "dk", "dv"), ours, eager, exact, strict=True):
        compare.assert_close(name, *each)


@pytest.mark.parametrize(
    ("wide", "same"), [((2**31 - 1, 0), (-1, 0)), ((2**40, 2**30), (-1, -1)), ((5, 2**31), (5, -1))]
)
def test_a_window_that_no_sequence_can_reach_is_no_limit_because_kernels_add_positions_to_it_in_32_bits(wide, same):
    q, k, v = (random(1, 8, 2, 16, seed=seed) for seed in range(3))
    assert _prepare(q, k, v, window_size=wide)[1] == _prepare(q, k, v, window_size=same)[1]
