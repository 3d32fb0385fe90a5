"""The Hopper forward of attention in the Gluon emulator: head dimensions, features, planted synchronisation bugs."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch
from emulated import no_gpu_in_sight
from triton._C.libtriton import gluon_ir, ir

from tilestack.kernels._gluon import _masking, gl
from tilestack.kernels.attention import reference, sm90_forward
from tilestack.kernels.attention.op import AttentionParams
from tilestack.kernels.attention.sm90_configs import FORWARD, SHORT, SHORT_FORWARD, forward_config
from tilestack.testing.compare import assert_close
from tilestack.testing.gluon_emulator import Emulator

pytestmark = no_gpu_in_sight
OFFSETS = ([0, 5, 5, 140, 400, 500], [0, 0, 30, 300, 420, 421])
ANY, CAUSAL = (-1, -1), (-1, 0)
STEEP = 1.0  # a softmax_scale with which maxima grow by more than SLACK from tile to tile
CASES = {  # batch, queries, keys, heads, key heads, head dimension, window, offsets, soft cap, sinks, a given scale
    "steep scores": (1, 200, 640, 2, 1, 64, CAUSAL, None, 0.0, False, STEEP),
    "steep scores, D = 192": (1, 70, 400, 2, 1, 192, ANY, None, 0.0, False, STEEP),
    "D = 64": (1, 300, 300, 2, 1, 64, CAUSAL, None, 0.0, False),
    "D = 96, odd lengths": (1, 200, 330, 2, 1, 96, CAUSAL, None, 0.0, False),
    "D = 192, packed, window": (None, 530, 431, 2, 1, 192, (70, 0), OFFSETS, 0.0, False),
    "a wide window": (1, 200, 900, 2, 1, 64, (530, 20), None, 0.0, False),
    "D = 256, every key": (1, 130, 300, 2, 1, 256, ANY, None, 0.0, False),
    "D = 256, several items a program": (1, 300, 200, 4, 1, 256, CAUSAL, None, 0.0, False),
    "D = 80, padded": (1, 140, 200, 2, 2, 80, CAUSAL, None, 0.0, False),
    "D = 33, padded": (1, 70, 70, 1, 1, 33, CAUSAL, None, 0.0, False),
    "soft cap": (1, 200, 330, 2, 1, 64, CAUSAL, None, 3.0, False),
    "sinks, queries that see no key": (1, 300, 100, 4, 1, 64, CAUSAL, None, 0.0, True),
    "soft cap, sinks, packed, window to both sides": (None, 530, 431, 4, 2, 128, (70, 20), OFFSETS, 3.0, True),
}


def run(case, emulator, monkeypatch, module=sm90_forward, dtype=torch.bfloat16):
    """(out, lse) of the emulated kernel, of the reference in the same dtype, and of the float64 oracle."""
    monkeypatch.setattr(module, "attention_forward_kernel", emulator.launcher(module.attention_forward_kernel))
    batch, n_q, n_k, heads, kv_heads, head_dim, (left, right), offsets, softcap, has_sinks, *scale = case
    generator = torch.Generator().manual_seed(0)
    leading = [] if batch is None else [batch]
    shapes = ((n_q, heads), (n_k, kv_heads), (n_k, kv_heads))
    tensors = [torch.randn(*leading, *shape, head_dim, generator=generator).to(dtype) for shape in shapes]
    cu_seqlens = [torch.tensor(each, dtype=torch.int32) for each in offsets or ()] or [None, None]
    sinks = torch.randn(heads, generator=generator) if has_sinks else None
    params = AttentionParams(*(scale or [head_dim**-0.5]), right == 0, left, right, -1, -1, False, softcap)
    results = []
    for each, cast in ((module, dtype), (reference, dtype), (reference, torch.float64)):
        logits = sinks if cast == dtype or sinks is None else sinks.double()
        results.append(each.forward(*(tensor.to(cast) for tensor in tensors), *cu_seqlens, logits, None, None, params))
    return results


def assert_right(results):
    for name, ours, eager, exact in zip(("out", "lse"), *results, strict=True):
        assert_close(name, ours, eager, exact)


@pytest.mark.parametrize("name", CASES)
def test_the_emulated_forward_is_within_twice_the_error_of_eager(name, monkeypatch):
    assert_right(run(CASES[name], Emulator(), monkeypatch))


def test_every_head_dimension_has_a_case():
    sizes = {sm90_forward.tile_size(case[5]) for case in CASES.values()}
    assert sizes == set(FORWARD)


@pytest.mark.parametrize(("head_dim", "tiles"), [*FORWARD.items(), *SHORT_FORWARD.items()])
def test_tiles_fit_into_shared_memory_and_hardware_barriers(head_dim, tiles):
    rows = 64 * tiles.Q_SLOTS * tiles.CONSUMERS + 2 * tiles.STAGES * tiles.BLOCK_N
    mbarriers = 8 * (tiles.Q_SLOTS + 2 * tiles.STAGES)
    assert head_dim == tiles.D + tiles.REST
    assert rows * head_dim * 2 + mbarriers <= 226 * 1024  # of 227 KB; Triton keeps what partitions capture there too
    assert 5 + 2 * tiles.STAGES + tiles.Q_SLOTS + tiles.CONSUMERS <= 16  # Triton has five itself


@pytest.mark.parametrize("width", sorted({tiles.BLOCK_N for tiles in FORWARD.values()}))
def test_the_ptx_of_the_mask_has_each_register_where_tritons_layout_has_it(width):
    context = ir.context()
    ir.load_dialects(context)
    builder = gluon_ir.GluonOpBuilder(context)
    scores = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, width, 16])
    layout = builder.to_linear_layout(scores._to_ir(builder), [64, width])
    assert layout.lane_bases == [[0, 2], [0, 4], [1, 0], [2, 0], [4, 0]]  # a thread begins at column 2 * (lane % 4)
    places = [[0, 0]]
    for basis in layout.reg_bases:
        places += [[row + basis[0], column + basis[1]] for row, column in places]
    text, _ = _masking.fn(width // 2, True)
    bounds = re.findall(r"setp.lt.s32 p, h(\d), (\d+); setp.gt.or.s32 p, l(\d), (\d+), p; selp.f32 \$(\d+)", text)
    found = [[8 * int(row), int(column)] for row, column, *_ in bounds]
    assert found == [[8 * int(row), int(column)] for *_, row, column, _ in bounds] == places
    assert [int(register) for *_, register in bounds] == list(range(width // 2))
    assert places[2] == [8, 0]  # the bounds of a thread's rows are taken from the first register and the third


def test_short_sequences_under_a_causal_mask_get_their_own_tiles():
    assert forward_config(64, True, SHORT) == SHORT_FORWARD[64]
    for causal, length in ((False, SHORT), (True, SHORT + 1), (True, -1)):
        assert forward_config(64, causal, length) == FORWARD[64]


def test_minus_infinity_as_a_sink_is_no_sink(monkeypatch):
    case = CASES["sinks, queries that see no key"]
    monkeypatch.setattr(torch, "randn", lambda *shape, generator=None, randn=torch.randn: (
        torch.full(shape, -torch.inf) if len(shape) == 1 else randn(*shape, generator=generator)
    ))  # fmt: skip
    results = run(case, Emulator(), monkeypatch)
    assert_right(results)
    assert results[0][1].isneginf().any(), "some queries of the case see no key"


PLANTED = {  # lines of the kernel, and what they become
    "Q is read before it has come": ("        mbarrier.wait(q_full.index(slot), number // C.Q_SLOTS % 2)\n", ""),
    "K is read before it has come": (
        """        mbarrier.wait(k_full.index(stage), phase)
        s = warp""",
        "        s = warp",
    ),
    "V is read before it has come": (
        """                mbarrier.wait(v_full.index(v_stage), v_phase)
""",
        "",
    ),
    "the next K tile is not waited for": (
        "                mbarrier.wait(k_full.index(stage), phase, pred=step + 1 < n_tiles)\n",
        "",
    ),
    "V is released before P V has run": (
        """                out, rest = wait_out(out_issued, rest_issued, C)
                barrier_arrive(C.V_FREE + v_stage, THREADS, 4)
""",
        """                barrier_arrive(C.V_FREE + v_stage, THREADS, 4)
                out, rest = wait_out(out_issued, rest_issued, C)
""",
    ),
    "K is never released": (
        """                s = wait_scores(s_issued, C)
                barrier_arrive(C.K_FREE + stage, THREADS, 4)
""",
        "                s = wait_scores(s_issued, C)\n",
    ),
    "the producer overwrites Q": (
        """        if number >= C.Q_SLOTS:
            barrier_sync(C.Q_FREE + slot, THREADS, 1)
""",
        "",
    ),
    "the turns are not handed over": ('                barrier_arrive(NEXT, "256", 4)\n', ""),
    "Q's slot is free before out has left it": (
        """            tma.store_wait(0)
            barrier_arrive(C.Q_FREE + (number - 1)""",
        "            barrier_arrive(C.Q_FREE + (number - 1)",
    ),
    "too few bytes are expected": ("v_full.index(stage), C.BLOCK_N * C.WIDTH * 2", "v_full.index(stage), C.WIDTH * 2"),
    "the scores are not rescaled": ("                out, rest = scaled(out, rest, alpha, C)\n", ""),
}


@pytest.mark.parametrize("bug", PLANTED)
def test_the_emulator_catches_a_bug_planted_into_the_forward(bug, tmp_path, monkeypatch):
    right, wrong = PLANTED[bug]
    source = Path(sm90_forward.__file__).read_text()
    assert source.count(right) == 1, "the planted bug no longer fits the kernel"
    path = tmp_path / "sm90_forward.py"
    path.write_text(source.replace(right, wrong))
    spec = importlib.util.spec_from_file_location("planted_sm90_forward", path)
    planted = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, planted)
    spec.loader.exec_module(planted)
    case = (
        1,
        300,
        640,
        8,
        1,
        128,
        ANY,
        None,
        0.0,
        False,
        STEEP,
    )  # more tiles than stages, more items a program than slots
    with pytest.raises(AssertionError):  # DeadlockError and ProtocolError are assertions too
        assert_right(run(case, Emulator(), monkeypatch, planted))
