"""The Hopper kernels of attention on the CPU, in the Gluon emulator: forward and backward together."""

import pytest
import torch
from emulated import no_gpu_in_sight

from tilestack.kernels.attention import reference, sm90_backward, sm90_forward, sm90_schedule
from tilestack.kernels.attention.layout import rows_by_heads
from tilestack.kernels.attention.op import AttentionParams
from tilestack.kernels.attention.sm90_tiles import RowTiles
from tilestack.testing.compare import assert_close
from tilestack.testing.gluon_emulator import Emulator

pytestmark = no_gpu_in_sight
NEEDS = ("q", "k", "v")
NO_FEATURES = (None, None, None)  # sinks, ALiBi slopes, the seed of dropout
OFFSETS = {"cu_seqlens_q": [0, 5, 5, 140, 400, 500], "cu_seqlens_k": [0, 0, 30, 300, 420, 421]}
CASES = {  # batch, queries, keys, query heads, key heads, head dimension, causal, window, offsets
    "causal, two heads of one key head": (1, 256, 256, 2, 1, 64, True, (-1, -1), {}),
    "odd length, heads of a key head in two items": (2, 300, 300, 4, 1, 64, True, (-1, -1), {}),
    "fewer queries than keys, D = 128": (1, 130, 400, 2, 2, 128, True, (-1, -1), {}),
    "queries that see no key": (1, 300, 100, 4, 1, 64, True, (-1, -1), {}),
    "every key, three heads of a key head": (1, 300, 300, 3, 1, 64, False, (-1, -1), {}),
    "causal window": (1, 300, 420, 2, 1, 64, True, (50, -1), {}),
    "window to both sides": (1, 300, 420, 4, 1, 64, False, (150, 20), {}),
    "packed, empty documents, rows of no document": (None, 530, 431, 4, 1, 64, True, (-1, -1), OFFSETS),
}


def make(case, dtype):
    batch, n_q, n_k, heads, kv_heads, head_dim, causal, (left, right), offsets = case
    generator = torch.Generator().manual_seed(0)
    leading = [] if batch is None else [batch]

    def random(rows, n_heads):
        return torch.randn(*leading, rows, n_heads, head_dim, generator=generator).to(dtype)

    tensors = [random(n_q, heads), random(n_k, kv_heads), random(n_k, kv_heads)]
    cu_seqlens = [torch.tensor(each, dtype=torch.int32) for each in offsets.values()] or [None, None]
    params = AttentionParams(head_dim**-0.5, causal, left, 0 if causal else right, -1, -1, False)
    return tensors, random(n_q, heads), cu_seqlens, params


def run(case, emulator, monkeypatch, dtype=torch.bfloat16, forward=sm90_forward, backward=sm90_backward):
    """Outputs and gradients of the emulated kernels, of the reference in the same dtype, and of the float64 oracle."""
    for module, name in ((forward, "attention_forward_kernel"), (backward, "attention_backward_kernel")):
        monkeypatch.setattr(module, name, emulator.launcher(getattr(module, name)))
    tensors, dout, cu_seqlens, params = make(case, dtype)
    results = []
    for each, cast in ((None, dtype), (reference, dtype), (reference, torch.float64)):
        q, k, v = (tensor.to(cast) for tensor in tensors)
        out, lse = (each or forward).forward(q, k, v, *cu_seqlens, *NO_FEATURES, params)
        saved = (q, k, v, *cu_seqlens, *(NO_FEATURES if each else (None,)), out, lse)
        gradients = (each or backward).backward(dout.to(cast), None, *saved, needs=NEEDS, params=params)
        results.append(dict(zip(("out", "lse", "dq", "dk", "dv"), (out, lse, *gradients), strict=True)))
    return results


def assert_right(results):
    ours, eager, exact = results
    for name in exact:
        assert_close(name, ours[name], eager[name], exact[name])


@pytest.mark.parametrize("name", CASES)
def test_emulated_hopper_kernels_are_within_twice_the_error_of_eager(name, monkeypatch):
    assert_right(run(CASES[name], Emulator(), monkeypatch))


def test_emulated_hopper_kernels_take_float16(monkeypatch):
    assert_right(run(CASES["packed, empty documents, rows of no document"], Emulator(), monkeypatch, torch.float16))


@pytest.mark.parametrize("shape", [(1, 8, 2, 64), (8, 2, 64)])
def test_rows_that_lie_over_one_another_are_copied_for_tma_and_others_are_not(shape):
    rows = torch.randn(shape)
    assert rows_by_heads(rows).data_ptr() == rows.data_ptr()
    of_a_sum = rows.narrow(-3, 0, 1).expand(shape)  # what out.sum over the queries gives as dout: stride 0
    found = rows_by_heads(of_a_sum)
    assert found.stride(0) == 2 * 64
    assert torch.equal(found.view(shape), of_a_sum)


def test_rows_that_begin_at_no_multiple_of_16_bytes_are_copied_for_tma_and_so_are_those_of_kept_descriptors():
    whole = torch.arange(8 * 2 * 64 + 1, dtype=torch.bfloat16)
    odd = whole[1:].view(8, 2, 64)
    tiles = RowTiles(odd.shape, odd.dtype, 4, 64, 0)
    for found in (rows_by_heads(odd), tiles.of(odd)[0].base):
        assert found.data_ptr() % 16 == 0 and torch.equal(found.view(8, 2, 64), odd)
    slices = torch.randn(8, 6, 64).bfloat16()[:, 2:4]  # of one product for q, k and v
    for tensor in (odd.clone(), slices):
        descriptor, rest = tiles.of(tensor)
        assert rest is None and descriptor.base.data_ptr() == tensor.data_ptr()
        assert descriptor.strides == [tensor.stride(0), 1] and descriptor.shape == [8, 128]


@pytest.mark.parametrize("section", [(1, 4), (2, 2), (1, 1)], ids=str)
def test_sections_of_documents_and_heads_leave_nothing_out(section, monkeypatch):
    asked = []
    monkeypatch.setattr(sm90_schedule, "forward_sections", lambda *sizes: asked.append(sizes) or section)
    # nothing that other sections were kept for, and nothing kept for other tests
    monkeypatch.setattr(sm90_forward, "dense_schedule", sm90_schedule.dense_schedule.__wrapped__)
    monkeypatch.setattr(sm90_forward, "_plan", sm90_forward._Plan)
    assert_right(run((2, 300, 300, 4, 4, 64, True, (-1, -1), {}), Emulator(), monkeypatch))
    assert asked
