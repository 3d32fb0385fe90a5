"""tilestack as a flash attention implementation of PyTorch.

PyTorch asks it on CUDA alone. Here the same functions are put under the key of the CPU, where PyTorch has none of these
operators, so that its own schemas, autograd and varlen_attn call them.
"""

import inspect

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch.nn import attention as torch_attention
from torch.nn.attention import SDPBackend, sdpa_kernel

from tilestack.compat import torch_attention as ours

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
aten = torch.ops.aten


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, DTYPE)


def integers(*values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


@pytest.fixture
def active():
    """Ours under the key of the device at hand."""
    handle = ours._activate("CUDA" if DEVICE == "cuda" else "CPU")
    yield
    handle.remove()


def exact(q, k, v, dout, **options):
    """out and gradients in float64, plain torch; [B, H, S, D]."""
    leaves = [each.detach().double().cpu().requires_grad_() for each in (q, k, v)]
    with sdpa_kernel(SDPBackend.MATH):
        out = F.scaled_dot_product_attention(*leaves, enable_gqa=True, **options)
    return [out, *torch.autograd.grad(out, leaves, dout.double().cpu())]


def assert_close(found, expected):
    for ours_, theirs in zip(found, expected, strict=True):
        assert ours_.dtype == DTYPE
        unit = torch.finfo(DTYPE).eps * theirs.abs().max()
        assert (ours_.detach().double().cpu() - theirs).abs().max() <= 8 * unit


def test_it_can_be_activated_and_restored_by_its_name():
    assert ours.NAME in torch_attention.list_flash_attention_impls()
    operators = [f"aten::{name}" for name in ours._OVERRIDES if hasattr(aten, name)]

    def on_cuda():
        return [torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA") for name in operators]

    before = on_cuda()
    torch_attention.activate_flash_attention_impl(ours.NAME)
    try:
        assert torch_attention.current_flash_attention_impl() == ours.NAME
        assert all(on_cuda())
    finally:
        torch_attention.restore_flash_attention_impl()
    assert torch_attention.current_flash_attention_impl() is None
    assert on_cuda() == before


@pytest.mark.parametrize("name", [name for name in ours._OVERRIDES if hasattr(aten, name)])
def test_every_override_takes_what_the_operators_schema_gives(name):
    schema = getattr(aten, name).default._schema
    positional = [each.name for each in schema.arguments if not each.kwarg_only]
    keywords = {each.name: each.default_value for each in schema.arguments if each.kwarg_only}
    signature = inspect.signature(ours._OVERRIDES[name])
    bound = signature.bind(*positional, **keywords)  # raises if one is not taken
    if "args" not in signature.parameters:
        assert list(bound.arguments)[: len(positional)] == positional


@pytest.mark.parametrize("layout", ["heads first", "rows first"])
@pytest.mark.parametrize("causal", [False, True])
def test_scaled_dot_product_attention_and_its_gradients(active, causal, layout):
    shapes = ((2, 4, 20, 32), (2, 2, 20, 32), (2, 2, 20, 32))
    if layout == "heads first":
        q, k, v = (random(*shape, seed=i) for i, shape in enumerate(shapes))
    else:
        q, k, v = (random(b, s, h, d, seed=i).transpose(1, 2) for i, (b, h, s, d) in enumerate(shapes))
    leaves = [each.detach().requires_grad_() for each in (q, k, v)]
    dout = random(2, 4, 20, 32, seed=7)
    out, lse, *_ = aten._scaled_dot_product_flash_attention(*leaves, 0.0, causal)
    assert out.stride() == torch.empty_like(q).stride() and lse.shape == (2, 4, 20)
    assert_close([out, *torch.autograd.grad(out, leaves, dout)], exact(q, k, v, dout, is_causal=causal))


def test_packed_attention_in_a_window_and_its_gradients(active):
    lengths, heads, head_dim = (9, 0, 20), 2, 16
    offsets = integers(0, 9, 9, 29)
    leaves = [random(29, heads, head_dim, seed=i).requires_grad_() for i in range(3)]
    dout = random(29, heads, head_dim, seed=7)
    out, lse, rng_state, unused, _ = aten._flash_attention_forward(
        *leaves, offsets, offsets, 20, 20, 0.0, False, False, scale=0.3, window_size_left=4, window_size_right=0
    )
    gradients = aten._flash_attention_backward(
        dout, *leaves, out, lse, offsets, offsets, 20, 20, 0.0, False, rng_state, unused, scale=0.3,
        window_size_left=4, window_size_right=0,
    )  # fmt: skip
    expected = [[], [], [], []]
    for begin, length in zip(offsets.tolist(), lengths, strict=False):
        rows = slice(begin, begin + length)
        distance = torch.arange(length)[:, None] - torch.arange(length)
        part = exact(
            *(each[rows].transpose(0, 1)[None] for each in leaves), dout[rows].transpose(0, 1)[None],
            attn_mask=(distance >= 0) & (distance <= 4), scale=0.3,
        )  # fmt: skip
        for pieces, piece in zip(expected, part, strict=True):
            pieces.append(piece[0].transpose(0, 1))
    assert_close([out, *gradients], [torch.cat(pieces) for pieces in expected])


def test_pages_and_used_lengths_read_the_same_keys(active):
    """Of the operators, PyTorch 2.11's take no pages yet: there, what is registered for later ones is called itself."""
    forward = aten._flash_attention_forward
    if "block_table" not in [each.name for each in forward.default._schema.arguments]:
        forward = ours._flash_attention_forward
    q, k, v = (random(5, 2, 16, seed=i) if i == 0 else random(4, 16, 2, 16, seed=i) for i in range(3))
    offsets, used = integers(0, 2, 5), integers(20, 9)
    table = integers(3, 1, 0, 2).view(2, 2)
    paged, *_ = forward(q, k, v, offsets, None, 3, 32, 0.0, True, False, seqused_k=used, block_table=table)
    flat = [each[table.long().flatten()].flatten(0, 1) for each in (k, v)]
    in_rows, *_ = forward(q, *flat, offsets, integers(0, 32, 64), 3, 32, 0.0, True, False, seqused_k=used)
    only = [torch.cat([each[:20], each[32:41]]) for each in flat]
    expected, *_ = forward(q, *only, offsets, integers(0, 20, 29), 3, 20, 0.0, True, False)
    assert_close([paged, in_rows], [expected.double().cpu()] * 2)


def test_dropout_is_fixed_by_the_seed_and_repeated_in_backward(active):
    q, k, v = (random(1, 2, 64, 16, seed=i) for i in range(3))
    results = []
    for _ in range(2):
        torch.manual_seed(5)
        leaves = [each.detach().requires_grad_() for each in (q, k, v)]
        out, *_ = aten._scaled_dot_product_flash_attention(*leaves, 0.5, False)
        results.append([out, *torch.autograd.grad(out, leaves, torch.ones_like(out))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    without, *_ = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, False)
    assert not torch.equal(results[0][0], without)
    # with dout = 1 and the same P dropped, sum(dv * v) = sum(P' 1 * v) = sum(P v) = sum(out), but for roundings of each
    out, dv_v = results[0][0].double(), results[0][3].double() * v.double()
    assert abs(dv_v.sum() - out.sum()) <= torch.finfo(DTYPE).eps * (dv_v.abs().sum() + out.abs().sum())
    assert abs(dv_v.sum() - without.double().sum()) > 0.01 * out.abs().sum(), "what is kept makes no difference"


def test_varlen_attn_of_torch_runs_it(active):
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    offsets = integers(0, 9, 20)
    q, k, v = (random(20, 2, 16, seed=i).requires_grad_() for i in range(3))
    out = varlen.varlen_attn(q, k, v, offsets, offsets, 11, 11)
    dout = random(20, 2, 16, seed=7)
    expected, *_ = aten._flash_attention_forward(q, k, v, offsets, offsets, 11, 11, 0.0, False, False)
    assert torch.equal(out, expected)
    assert all(each.isfinite().all() for each in torch.autograd.grad(out, (q, k, v), dout))


def test_what_it_does_not_do_is_said(active):
    q = random(1, 2, 8, 16)
    with pytest.raises(ValueError, match="return_debug_mask must be False"):
        aten._scaled_dot_product_flash_attention(q, q, q, 0.0, False, True)
