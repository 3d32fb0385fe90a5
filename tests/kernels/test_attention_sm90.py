"""The Hopper kernels of attention on the CPU, in the Gluon emulator: numbers, and planted synchronisation bugs."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from tilestack.kernels.attention import reference, sm90_backward, sm90_forward, sm90_gluon, sm90_schedule
from tilestack.kernels.attention.layout import rows_by_heads
from tilestack.kernels.attention.op import AttentionParams
from tilestack.kernels.device import Device
from tilestack.kernels.dispatch import Call, TensorSpec
from tilestack.testing.compare import assert_close
from tilestack.testing.gluon_emulator import Emulator

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
        saved = (q, k, v, *cu_seqlens, *(NO_FEATURES if each else ()), out, lse)
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


@pytest.mark.parametrize("section", [(1, 4), (2, 2), (1, 1)], ids=str)
def test_sections_of_documents_and_heads_leave_nothing_out(section, monkeypatch):
    monkeypatch.setattr(sm90_schedule, "forward_sections", lambda *_: section)
    assert_right(run((2, 300, 300, 4, 4, 64, True, (-1, -1), {}), Emulator(), monkeypatch))


@pytest.mark.parametrize(
    ("documents", "queries", "taken"), [(4096, 65536, False), (1024, 4096, True), (64, 16384, True)]
)
def test_very_many_very_short_documents_are_refused_with_gradients(documents, queries, taken):
    rows = TensorSpec.contiguous((queries, 4, 64), torch.bfloat16)
    offsets = TensorSpec.contiguous((documents + 1,), torch.int32)
    tensors = {"q": rows, "k": rows, "v": rows, "cu_seqlens_q": offsets, "cu_seqlens_k": offsets}
    params = AttentionParams(0.125, True, -1, 0, -1, -1, False)
    device = Device("cuda", "sm_90", "an H100")
    assert (sm90_gluon.refuses(Call(device, tensors, params, needs_grad=True)) is None) == taken
    assert sm90_gluon.refuses(Call(device, tensors, params, needs_grad=False)) is None


BACKWARD = "sm90_backward"
PLANTED = {  # the module, lines of its source, and what they become
    "Q is read before it has come": (BACKWARD, "        mbarrier.wait(q_full.index(stage), phase)\n", ""),
    "dO is read before it has come": (BACKWARD, "        mbarrier.wait(do_full.index(stage), phase)\n", ""),
    "Q is released before dK has run": (
        BACKWARD,
        """        dk_issued = warpgroup_mma_init(warpgroup_mma_wait(0, deps=[dk_issued]))
        barrier_arrive(Q_FREE + stage, "288", 8)
""",
        """        barrier_arrive(Q_FREE + stage, "288", 8)
        dk_issued = warpgroup_mma_init(warpgroup_mma_wait(0, deps=[dk_issued]))
""",
    ),
    "dQ is overwritten before it has left": (
        BACKWARD,
        "        tma.store_wait(0)  # the previous dQ has left shared memory\n",
        "",
    ),
    "too few bytes are expected": (
        BACKWARD,
        "k_desc.block_type.nbytes + v_desc.block_type.nbytes",
        "k_desc.block_type.nbytes",
    ),
    "the loader does not wait for a free buffer": (
        BACKWARD,
        """        if it >= STAGES:
            barrier_sync(DO_FREE + stage, "288", 1)
""",
        "",
    ),
}


@pytest.mark.parametrize("bug", PLANTED)
def test_the_emulator_catches_a_planted_bug(bug, tmp_path, monkeypatch):
    where, right, wrong = PLANTED[bug]
    modules = {"forward": sm90_forward, "backward": sm90_backward}
    original = modules[where.removeprefix("sm90_")]
    source = Path(original.__file__).read_text()
    assert source.count(right) == 1, "the planted bug no longer fits the kernel"
    path = tmp_path / f"{where}.py"
    path.write_text(source.replace(right, wrong))
    spec = importlib.util.spec_from_file_location(f"planted_{where}", path)
    planted = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, planted)
    spec.loader.exec_module(planted)
    modules[where.removeprefix("sm90_")] = planted
    case = (1, 300, 640, 4, 1, 64, False, (-1, -1), {})  # more tiles than stages, several items a program
    with pytest.raises(AssertionError):  # DeadlockError and ProtocolError are assertions too
        assert_right(run(case, Emulator(), monkeypatch, **modules))
