"""The Hopper backward of attention on the CPU, in the Gluon emulator: numbers, order, and planted bugs."""

import dataclasses
import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from emulated import no_gpu_in_sight
from test_launch import launches_wait

from tilestack.kernels.attention import reference, sm90_backward, sm90_backward_kernel
from tilestack.kernels.attention.op import AttentionParams
from tilestack.testing.compare import assert_close
from tilestack.testing.gluon_emulator import DeadlockError, Emulator

pytestmark = no_gpu_in_sight
OFFSETS = ([0, 5, 5, 140, 400, 500], [0, 0, 30, 300, 420, 421])


@dataclass(frozen=True)
class Case:
    """batch None: packed, with `offsets`; window: (left, right)."""

    queries: int
    keys: int
    heads: int = 4
    kv_heads: int = 1
    head_dim: int = 64
    window: tuple[int, int] = (-1, 0)
    batch: int | None = 1
    offsets: tuple = (None, None)
    deterministic: bool | str = False
    softcap: float = 0.0
    sinks: bool = False


CASES = {  # what test_attention_sm90.py has not
    # two documents: items of the last section go the other way
    "deterministic, causal": Case(300, 300, batch=2, deterministic=True),
    "deterministic, window": Case(300, 420, 2, window=(70, 20), batch=2, deterministic=True),
    "deterministic, every key": Case(130, 300, 2, window=(-1, -1), batch=2, deterministic=True),
    "deterministic, packed, D = 128": Case(530, 431, 2, 1, 128, batch=None, offsets=OFFSETS, deterministic=True),
    "soft cap": Case(200, 300, 2, softcap=1.5),
    "sinks": Case(200, 300, 4, batch=2, sinks=True),
    "sinks, packed, queries that see no key": Case(530, 431, batch=None, offsets=OFFSETS, sinks=True),
    "D = 256": Case(130, 200, 2, 1, 256, batch=2),
    "D = 256, every key": Case(200, 130, 2, 2, 256, window=(-1, -1)),
    "D = 96": Case(200, 260, 2, 1, 96, batch=2),
    "D = 192, window": Case(130, 200, 2, 2, 192, window=(60, 30)),
    "deterministic, D = 96, sinks": Case(200, 200, 4, 1, 96, deterministic=True, sinks=True),
    "a head dimension between the tiles": Case(130, 150, 2, 1, 80),
}


def gradients(case, emulator, monkeypatch, dtype=torch.bfloat16, kernels=sm90_backward_kernel):
    """Gradients of the emulated kernel, of the reference in the same dtype, and of the float64 oracle."""
    launches_wait(monkeypatch)
    emulated = emulator.launcher(kernels.attention_backward_kernel)
    monkeypatch.setattr(sm90_backward, "attention_backward_kernel", emulated)
    generator = torch.Generator().manual_seed(0)
    leading = [] if case.batch is None else [case.batch]

    def random(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    def rows(length, heads):
        return random(*leading, length, heads, case.head_dim)

    q, dout = rows(case.queries, case.heads), rows(case.queries, case.heads)
    k, v = rows(case.keys, case.kv_heads), rows(case.keys, case.kv_heads)
    sinks = random(case.heads) if case.sinks else None
    cu_seqlens = [None if each is None else torch.tensor(each, dtype=torch.int32) for each in case.offsets]
    left, right = case.window
    params = AttentionParams(
        case.head_dim**-0.5, right == 0, left, right, -1, -1, case.deterministic is True, case.softcap,
        deterministic_keys=bool(case.deterministic),
    )  # fmt: skip
    needs = ("q", "k", "v", "sinks") if case.sinks else ("q", "k", "v")
    found = []
    for cast in (dtype, torch.float64):
        inputs = [None if each is None else each.to(cast) for each in (q, k, v, sinks)]
        inputs = (*inputs[:3], *cu_seqlens, inputs[3])
        out, lse = reference.forward(*inputs, None, None, params)
        if cast == dtype:
            found.append(sm90_backward.backward(dout, None, *inputs, out, lse, needs=needs, params=params))
        found.append(reference.backward(dout.to(cast), None, *inputs, None, None, out, lse, needs=needs, params=params))
    return [dict(zip(("dq", "dk", "dv", "dsinks"), each, strict=False)) for each in found]


def assert_right(found):
    ours, eager, exact = found
    for name in exact:
        assert_close(name, ours[name], eager[name], exact[name])


@pytest.mark.parametrize("name", CASES)
def test_the_emulated_backward_is_within_twice_the_error_of_eager(name, monkeypatch):
    assert_right(gradients(CASES[name], Emulator(), monkeypatch))


@pytest.mark.parametrize("name", ["deterministic, packed, D = 128", "D = 96"])
def test_the_emulated_backward_takes_float16(name, monkeypatch):
    assert_right(gradients(CASES[name], Emulator(), monkeypatch, torch.float16))


def test_an_item_waits_until_the_items_before_it_have_added_their_part(monkeypatch):
    emulator = Emulator()
    emulator.reversed = True  # what starts first is what must come last
    with pytest.raises(DeadlockError, match="turn"):
        gradients(CASES["deterministic, causal"], emulator, monkeypatch)


def keys_kept_their_bits(group, deterministic, monkeypatch):
    """Whether dk and dv have the same bits if the items run in the opposite order."""
    case = Case(70, 100, group, window=(-1, -1), deterministic=deterministic)
    orders = [Emulator(), Emulator()]
    orders[1].reversed = True
    first, second = (gradients(case, each, monkeypatch)[0] for each in orders)
    return all(torch.equal(first[name], second[name]) for name in ("dk", "dv"))


def test_dk_and_dv_need_no_order_where_at_most_two_items_add_to_them(monkeypatch):
    assert keys_kept_their_bits(4, "keys", monkeypatch)
    assert not keys_kept_their_bits(3, False, monkeypatch), "then three items need none either"
    with pytest.raises(DeadlockError, match="turn"):  # all wait for what starts last
        keys_kept_their_bits(3, "keys", monkeypatch)


PLAIN = Case(300, 640, window=(-1, -1))  # more tiles than stages, items of several heads
BUGS = {  # a case, and (lines of the source, what they become) ...
    "K and V are read before they have come": (PLAIN, ("    mbarrier.wait(kv_full, 0)\n", "")),
    "the first Q is read before it has come": (
        PLAIN,
        ("    mbarrier.wait(q_full.index(0), 0, pred=total > 0)\n", ""),
    ),
    "the next Q is read before it has come": (
        PLAIN,
        ("        mbarrier.wait(q_full.index(next_stage), next_phase)\n", ""),
    ),
    "dO is read before it has come": (PLAIN, ("        mbarrier.wait(do_full.index(stage), phase)\n", "")),
    "Q is released before dK has run": (
        PLAIN,
        (
            "        if not CARRY:\n",
            """        if not CARRY:\n            barrier_arrive(Q_FREE + stage, "288", 8)\n""",
        ),
        (
            """            dk_issued = warpgroup_mma_init(dk_done)
            barrier_arrive(Q_FREE + stage, "288", 8)
""",
            "            dk_issued = warpgroup_mma_init(dk_done)\n",
        ),
    ),
    "Q is released before a dK that is carried over has run": (
        dataclasses.replace(PLAIN, head_dim=128),
        (
            """        if CARRY:
            if TAIL:
""",
            """        if CARRY:
            if it > 0:
                barrier_arrive(Q_FREE + (stage + STAGES - 1) % STAGES, "288", 8)
            if TAIL:
""",
        ),
        (
            """                dk_done = warpgroup_mma_wait(groups, deps=[dk_issued])
            if it > 0:
                barrier_arrive(Q_FREE + (stage + STAGES - 1) % STAGES, "288", 8)
""",
            "                dk_done = warpgroup_mma_wait(groups, deps=[dk_issued])\n",
        ),
    ),
    "too few bytes are expected": (
        PLAIN,
        ("mbarrier.expect(kv_full, 2 * BLOCK_N", "mbarrier.expect(kv_full, BLOCK_N"),
    ),
    "the loader does not wait for a free buffer": (
        PLAIN,
        ("""        if it >= STAGES:\n            barrier_sync(DO_FREE + stage, "288", 1)\n""", ""),
    ),
    "the buffer of dQ is not waited for": (
        PLAIN,
        ("""            group_barrier_sync(DQ_FREE + zero, "160", 8)""", "            pass"),
    ),
    "the buffer of dQ with a tail is not waited for": (
        dataclasses.replace(PLAIN, head_dim=96, deterministic=True),
        ("""                barrier_sync(DQ_FREE + zero, "288", 8)""", "                pass"),
    ),
    "dQ is overwritten before it has left": (
        PLAIN,
        ("            tma.store_wait(PARTS - 1 - part)\n", ""),
    ),
    "dQ of the wrong warpgroup may be overwritten": (
        PLAIN,
        ("tma.store_wait(PARTS - 1 - part)", "tma.store_wait(PARTS)"),
    ),
    "dQ with a tail is overwritten before it has left": (
        dataclasses.replace(PLAIN, head_dim=96),
        ("            tma.store_wait(0)  # the previous dQ has left shared memory\n", "            pass\n"),
    ),
    "dS' is read before a fence": (
        PLAIN,
        ("        fence_async_shared()\n        # after the last block", "        # after the last block"),
    ),
    "dQ is added before a fence": (
        PLAIN,
        (
            "            fence_async_shared()\n            group_barrier_arrive(DQ_FULL + zero",
            "            group_barrier_arrive(DQ_FULL + zero",
        ),
    ),
    "the last dQ is added before a fence": (
        PLAIN,
        (
            "            fence_async_shared()\n            group_barrier_arrive(DQ_FULL + 0 * total",
            "            group_barrier_arrive(DQ_FULL + 0 * total",
        ),
    ),
    "the last dQ is not handed over": (
        PLAIN,
        ("""            group_barrier_arrive(DQ_FULL + 0 * total, "160", 8)\n""", ""),
    ),
    "dQ with a tail is added before a fence": (
        dataclasses.replace(PLAIN, head_dim=96, deterministic=True),
        (
            "            fence_async_shared()\n            if dq_first:\n",
            "            if dq_first:\n",
        ),
    ),
    "the second warpgroup's dQ lands on the first's": (
        PLAIN,
        ("[0, row + 64 * part, 0]", "[0, row, 0]"),
    ),
    "the turn is kept": (
        dataclasses.replace(PLAIN, deterministic=True),
        ("            pass_turn(counter, 1)\n            if it", "            if it"),
    ),
    "the turn is counted from the wrong first item": (
        Case(300, 420, 2, window=(70, 20), deterministic=True),
        ("gl.maximum(m * BLOCK_M + n_k - n_q - left, 0)", "gl.maximum(m * BLOCK_M - left, 0)"),
    ),
    "the turn is counted from the wrong last item": (
        Case(300, 420, 2, window=(-1, 20), batch=2, deterministic=True),
        ("m * BLOCK_M + BLOCK_M - 1 + n_k - n_q + right", "m * BLOCK_M + n_k - n_q + right"),
    ),
    "all items start with the earliest keys": (
        dataclasses.replace(PLAIN, batch=2, deterministic=True),
        ("        n = gl.where(rising, n_blocks - 1 - n, n)\n", ""),
    ),
}


@pytest.mark.parametrize("bug", BUGS)
def test_the_emulator_catches_a_planted_bug(bug, tmp_path, monkeypatch):
    case, *changes = BUGS[bug]
    source = Path(sm90_backward_kernel.__file__).read_text()
    for right, wrong in changes:
        assert source.count(right) == 1, "the planted bug no longer fits the kernel"
        source = source.replace(right, wrong)
    path = tmp_path / "planted.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location("planted_backward", path)
    planted = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, planted)
    spec.loader.exec_module(planted)
    with pytest.raises(AssertionError):  # DeadlockError and ProtocolError are assertions too
        assert_right(gradients(case, Emulator(), monkeypatch, kernels=planted))
