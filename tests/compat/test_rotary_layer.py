"""layers.rotary: values and gradients against plain torch in float64, in every layout; the layer and its tables."""

import math

import pytest
import torch
from naive_attention import DEVICE, random

from tilestack.compat.flash_attn.layers.rotary import (
    RotaryEmbedding,
    apply_rotary_emb,
    apply_rotary_emb_kv_,
    apply_rotary_emb_qkv_,
    apply_rotary_emb_torch,
    rotate_half,
)
from tilestack.compat.flash_attn.ops.triton.rotary import apply_rotary, rotary_kernel
from tilestack.kernels import launch
from tilestack.testing.compare import assert_close


def tables(length, columns, dtype=torch.bfloat16):
    angles = 6 * torch.rand(length, columns, generator=torch.Generator().manual_seed(5))
    return angles.cos().to(DEVICE, dtype), angles.sin().to(DEVICE, dtype)


def at(tables, offsets, length):
    """The rows of cos and sin of each sequence: [B, S, R / 2]."""
    return [torch.stack([each[start : start + length] for start in offsets]) for each in tables]


def evaluate(function, x, dout):
    leaf = x.detach().clone().requires_grad_()
    out = function(leaf)
    return out.detach(), torch.autograd.grad(out, leaf, dout.to(out.dtype))[0]


def compare(ours, plain, x):
    """Value and gradient of `ours` against `plain(x, wide)` in plain torch, by the error rule."""
    dout = random(*x.shape, dtype=x.dtype, seed=9).detach()
    results = [
        evaluate(ours, x, dout),
        evaluate(lambda each: plain(each, x.dtype), x, dout),
        [each.cpu() for each in evaluate(lambda each: plain(each, torch.float64), x.double(), dout.double())],
    ]
    for index, name in enumerate(("out", "dx")):
        assert_close(name, *(each[index] for each in results))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("columns", [8, 4])
@pytest.mark.parametrize("offsets", [0, 7, (3, 11)], ids=str)
@pytest.mark.parametrize("inplace", [False, True])
def test_values_and_gradients_are_right(interleaved, columns, offsets, inplace):
    x = random(2, 9, 3, 16, seed=1).detach()
    cos, sin = tables(32, columns)
    starts = offsets if isinstance(offsets, tuple) else (offsets, offsets)
    given = torch.tensor(starts, device=DEVICE) if isinstance(offsets, tuple) else offsets

    def plain(x, dtype):
        return apply_rotary_emb_torch(x, *(each.to(dtype) for each in at((cos, sin), starts, 9)), interleaved)

    def ours(x):
        x = x + 0 if inplace else x  # a leaf may not be written
        out = apply_rotary_emb(x, cos, sin, interleaved, inplace, given)
        assert (out is x) == inplace
        return out

    compare(ours, plain, x)


def test_packed_sequences_are_right():
    x = random(14, 3, 16, seed=1).detach()
    cos, sin = tables(32, 8)
    cu = torch.tensor([0, 5, 5, 14], dtype=torch.int32, device=DEVICE)
    offsets = torch.tensor([3, 0, 8], dtype=torch.int32, device=DEVICE)

    def plain(x, dtype):
        rows = torch.cat([torch.arange(3, 8), torch.arange(8, 17)])
        return apply_rotary_emb_torch(x[None], cos[rows].to(dtype), sin[rows].to(dtype))[0]

    compare(lambda x: apply_rotary_emb(x, cos, sin, seqlen_offsets=offsets, cu_seqlens=cu, max_seqlen=9), plain, x)


LAYOUTS = {
    "five dimensions": (2, 9, 3, 4, 16),
    "heads side by side": (2, 9, 4 + 2 * 2, 16),
    "strided": (2, 9, 3, 4, 16),
}


@pytest.mark.parametrize("of_k", [False, True], ids=["same angles", "k has its own"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_q_and_k_of_packed_projections_are_rotated_and_v_is_left(layout, of_k):
    x = random(*LAYOUTS[layout], seed=1).detach()
    (cos, sin), (cos_k, sin_k) = tables(9, 8), [each.roll(1, 0) for each in tables(9, 8)]
    heads = 4 if x.dim() == 4 else None
    if layout == "strided":  # q, k and v far apart, so that two launches are needed
        x = x.movedim(2, 0).contiguous().movedim(0, 2)

    def split(x):
        return x.unbind(2) if x.dim() == 5 else x.split((4, 2, 2), 2)

    def plain(x, dtype):
        q, k, v = split(x)
        of_q, of_keys = (cos.to(dtype), sin.to(dtype)), (cos_k.to(dtype), sin_k.to(dtype))
        parts = apply_rotary_emb_torch(q, *of_q), apply_rotary_emb_torch(k, *(of_keys if of_k else of_q)), v
        return torch.stack(parts, 2) if x.dim() == 5 else torch.cat(parts, 2)

    def ours(x):
        x = x.clone()  # keeps the strides
        more = (cos_k, sin_k) if of_k else ()
        out = apply_rotary_emb_qkv_(x, cos, sin, *more, num_heads_q=heads)
        assert out is x
        return out

    compare(ours, plain, x)


def test_k_of_packed_keys_and_values_is_rotated_and_v_is_left():
    x, (cos, sin) = random(2, 9, 2, 3, 16, seed=1).detach(), tables(16, 8)

    def plain(x, dtype):
        k, v = x.unbind(2)
        return torch.stack((apply_rotary_emb_torch(k, cos[5:14].to(dtype), sin[5:14].to(dtype)), v), 2)

    compare(lambda x: apply_rotary_emb_kv_(x + 0, cos, sin, seqlen_offsets=5), plain, x)


def test_a_gradient_that_others_see_is_not_written_over():
    x, (cos, sin) = random(1, 5, 3, 2, 8, seed=1), tables(5, 4)
    dout = torch.ones(x.shape, dtype=x.dtype, device=DEVICE)
    torch.autograd.grad(apply_rotary_emb_qkv_(x + 0, cos, sin), x, dout)
    assert (dout == 1).all()


def test_rotating_back_is_the_inverse_and_a_half_turn_swaps_the_pairs():
    x, (cos, sin) = random(1, 6, 2, 8, dtype=torch.float32, seed=1).detach(), tables(6, 4, torch.float32)
    torch.testing.assert_close(apply_rotary(apply_rotary(x, cos, sin), cos, sin, conjugate=True), x)
    values = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert rotate_half(values).tolist() == [-3, -4, 1, 2]
    assert rotate_half(values, interleaved=True).tolist() == [-2, 1, -4, 3]


def test_it_compiles_into_one_graph():
    x, (cos, sin) = random(2, 9, 3, 16, seed=1), tables(16, 8)
    compiled = torch.compile(apply_rotary_emb, fullgraph=True, backend="aot_eager")
    found, expected = compiled(x, cos, sin, seqlen_offsets=3), apply_rotary_emb(x, cos, sin, seqlen_offsets=3)
    assert torch.equal(found, expected)
    assert torch.equal(*(torch.autograd.grad(each.square().sum(), x)[0] for each in (found, expected)))


@pytest.mark.skipif(DEVICE.type != "cuda", reason="counts what Triton compiles, for which there must be a GPU")
def test_two_kernels_are_compiled_for_all_lengths_and_batches(monkeypatch):
    compiled = []
    import triton

    monkeypatch.setattr(launch, "_COMPILED", {})
    with triton.knobs.runtime.scope():
        rotary_kernel.device_caches.clear()
        triton.knobs.runtime.jit_cache_hook = lambda **call: compiled.append(call["key"]) and False
        for length in (128, 256):
            for batch in (4, 32):
                x, (cos, sin) = random(batch, length, 4, 64, seed=1), tables(length, 32)
                apply_rotary_emb(x, cos, sin).sum().backward()
    assert len(compiled) == 2  # forward, and back


def angles(positions, dim, base=10000.0):
    return torch.outer(positions.double(), base ** (-torch.arange(0, dim, 2).double() / dim))


def test_the_layer_rotates_by_its_own_tables_which_grow():
    layer = RotaryEmbedding(8, base=500.0, device=DEVICE)
    for length, offset in ((5, 0), (7, 4), (3, 1)):
        qkv = random(2, length, 3, 2, 16, dtype=torch.float32, seed=1).detach()
        own = angles(torch.arange(offset, offset + length), 8, 500.0)
        q, k, v = qkv.double().cpu().unbind(2)
        turned = [apply_rotary_emb_torch(each, own.cos(), own.sin()) for each in (q, k)]
        out = layer(qkv.clone(), seqlen_offset=offset)
        torch.testing.assert_close(out.cpu(), torch.stack((*turned, v), 2).float())
    assert layer._seq_len_cached == 11 and list(layer.state_dict()) == []


def test_the_layer_rotates_q_beside_packed_keys_and_takes_offsets_that_are_not_read():
    layer = RotaryEmbedding(16, interleaved=True, device=DEVICE)
    q = random(2, 3, 4, 16, dtype=torch.float32, seed=1).detach()
    kv = random(2, 3, 2, 2, 16, dtype=torch.float32, seed=2).detach()
    offsets = torch.tensor([4, 0], device=DEVICE)
    with pytest.raises(ValueError, match="max_seqlen must be given where seqlen_offset is a tensor"):
        layer(q.clone(), kv.clone(), seqlen_offset=offsets)
    q_out, kv_out = layer(q.clone(), kv.clone(), seqlen_offset=offsets, max_seqlen=8)
    for index, start in enumerate((4, 0)):
        own = angles(torch.arange(start, start + 3), 16).float().to(DEVICE)
        expected = [
            apply_rotary_emb_torch(each[index, None], own.cos(), own.sin(), True)[0] for each in (q, kv[:, :, 0])
        ]
        torch.testing.assert_close(q_out[index], expected[0])
        torch.testing.assert_close(kv_out[index, :, 0], expected[1])
        assert torch.equal(kv_out[index, :, 1], kv[index, :, 1])


def test_xpos_scales_queries_up_and_keys_down_so_that_distance_alone_matters():
    layer = RotaryEmbedding(16, scale_base=4.0, device=DEVICE)
    row = random(1, 1, 3, 1, 16, dtype=torch.float32, seed=1).detach().expand(1, 12, 3, 1, 16)
    out = layer(row.clone())
    scores = torch.einsum("bihd,bjhd->bhij", out[:, :, 0], out[:, :, 1])[0, 0]
    by_distance = [scores.diagonal(-each) for each in range(6)]
    for each in by_distance:
        torch.testing.assert_close(each, each[:1].expand_as(each))
    plain = RotaryEmbedding(16, device=DEVICE)(row.clone())
    assert not torch.allclose(plain[:, 0], out[:, 0])


def test_frequencies_stay_float32_in_a_model_that_was_converted():
    layer = RotaryEmbedding(64, device=DEVICE).to(torch.bfloat16)
    layer._update_cos_sin_cache(5000, DEVICE, torch.float32)
    angle = 4999 * 10000.0 ** (-2 / 64)
    unit = 2.0**-12  # of float32 at this angle; bfloat16's is 16
    assert abs(layer._cos_cached[4999, 1].item() - math.cos(angle)) < 3 * unit
