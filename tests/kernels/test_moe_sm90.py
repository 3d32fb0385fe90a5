"""The Hopper kernels of moe on the CPU, in the Gluon emulator: numbers, what is not needed, planted bugs."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from emulated import no_gpu_in_sight
from test_launch import launches_wait

from tilestack.kernels.moe import reference, sm90_activation, sm90_gluon, sm90_rows, sm90_weights
from tilestack.kernels.moe.op import MoEParams
from tilestack.kernels.moe.sm90_layout import Layout
from tilestack.testing.compare import assert_close
from tilestack.testing.gluon_emulator import Emulator

pytestmark = no_gpu_in_sight
NEEDS = ("x", "gate_up", "down", "topk_weights")
KERNELS = (
    (sm90_rows, "moe_up_sm90_kernel"),
    (sm90_rows, "moe_rows_sm90_kernel"),
    (sm90_activation, "moe_activation_bwd_sm90_kernel"),
    (sm90_weights, "moe_weights_bwd_sm90_kernel"),
)


def balanced(tokens, top_k, experts, generator):
    return torch.rand(tokens, experts, generator=generator).argsort(-1)[:, :top_k]


def skewed(tokens, top_k, experts, generator):
    chance = torch.rand(tokens, experts, generator=generator) ** (1.0 + torch.arange(experts))
    return chance.argsort(-1, descending=True)[:, :top_k]


def one_takes_all(tokens, top_k, experts, generator):
    return torch.full((tokens, top_k), experts - 2)


def partly_elsewhere(tokens, top_k, experts, generator):
    return torch.randint(-2, experts + 3, (tokens, top_k), generator=generator)


def few_here(tokens, top_k, experts, generator):
    ids = torch.randint(0, experts, (tokens, top_k), generator=generator)
    return torch.where(torch.arange(top_k) == 1, ids, -1)


CASES = {  # T, H, I, E, K, routing, weights
    "balanced": (150, 256, 256, 3, 2, balanced, True),
    "skewed, more tiles than programs, more steps than stages": (300, 320, 128, 5, 2, skewed, True),
    "one expert takes all, the others are empty": (200, 128, 128, 4, 1, one_takes_all, True),
    "more blocks of an expert than go column by column, by ticket": (600, 320, 64, 1, 1, balanced, True),
    "one route a token, no weights, 77 tokens": (77, 64, 64, 3, 1, balanced, False),
    "ids of other ranks, H and I of partial tiles": (90, 192, 192, 4, 3, partly_elsewhere, True),
    "one token": (1, 128, 320, 20, 16, balanced, True),
    "few of many routes are here, and there is memory for no more": (300, 128, 128, 4, 3, few_here, True),
}


def make(case, dtype):
    tokens, hidden, units, experts, top_k, routing, weighted = case
    generator = torch.Generator().manual_seed(0)

    def random(*size, scale=1.0):
        return (scale * torch.randn(*size, generator=generator)).to(dtype)

    tensors = [
        random(tokens, hidden),
        random(experts, 2 * units, hidden, scale=hidden**-0.5),
        random(experts, hidden, units, scale=units**-0.5),
        routing(tokens, top_k, experts, generator).int(),
        torch.rand(tokens, top_k, generator=generator) + 0.1 if weighted else None,
    ]
    return tensors, random(tokens, hidden)


def run_hopper(tensors, dout, emulator, monkeypatch, needs, keep=True, totals=(None, None)):
    """Out and gradients of the emulated kernels, with 2 programs in place of a GPU's multiprocessors."""
    here = int(((tensors[3] >= 0) & (tensors[3] < tensors[2].shape[0])).sum())
    params = MoEParams(keep, most_routes=here if here < tensors[3].numel() // 2 else -1)
    with monkeypatch.context() as patch:
        launches_wait(patch)
        for module, name in KERNELS:
            patch.setattr(module, name, emulator.launcher(getattr(module, name)))
        patch.setattr("tilestack.kernels.launch.multiprocessors", lambda tensor: 2)
        x, gate_up, down, topk_ids, topk_weights = tensors
        out, *auxiliary = sm90_gluon.forward(*tensors, *totals, params)
        fake = sm90_gluon.fake_auxiliary(*tensors, *totals, params)
        assert [(each.shape, each.dtype) for each in auxiliary] == [(each.shape, each.dtype) for each in fake]
        saved = (x, gate_up, down, topk_ids, topk_weights, *totals, *auxiliary)
        gradients = sm90_gluon.backward(dout, *saved, needs=needs, params=params)
        layout = Layout(auxiliary[-1], topk_ids.numel(), down.shape[0], params.bound(topk_ids.numel()))
        assert not topk_ids.numel() or not layout.counters.any(), "a kernel begins where the last one left the tickets"
    return {"out": out} | dict(zip(needs, gradients, strict=True))


def run_reference(tensors, dout, dtype, needs):
    tensors = [each.to(dtype) if each is not None and each.is_floating_point() else each for each in tensors]
    if tensors[4] is not None:
        tensors[4] = tensors[4].to(torch.promote_types(dtype, torch.float32))
    (out,) = reference.forward(*tensors, None, None, MoEParams(True))
    gradients = reference.backward(dout.to(dtype), *tensors, None, None, needs=needs, params=MoEParams(True))
    return {"out": out} | dict(zip(needs, gradients, strict=True))


def check(case, emulator, monkeypatch, dtype=torch.bfloat16, needs=None):
    tensors, dout = make(case, dtype)
    needs = needs or tuple(name for name in NEEDS if name != "topk_weights" or tensors[4] is not None)
    ours = run_hopper(tensors, dout, emulator, monkeypatch, needs)
    eager, exact = (run_reference(tensors, dout, each, needs) for each in (dtype, torch.float64))
    for name in exact:
        assert_close(name, ours[name], eager[name], exact[name])


@pytest.mark.parametrize("name", CASES)
def test_emulated_hopper_kernels_are_within_twice_the_error_of_eager(name, monkeypatch):
    check(CASES[name], Emulator(), monkeypatch)


def test_emulated_hopper_kernels_take_float16(monkeypatch):
    check(CASES["ids of other ranks, H and I of partial tiles"], Emulator(), monkeypatch, torch.float16)


@pytest.mark.parametrize(
    "needs", [("x",), ("gate_up",), ("down",), ("topk_weights",), ("x", "topk_weights")], ids=" ".join
)
def test_a_gradient_that_nobody_needs_changes_no_other(needs, monkeypatch):
    check(CASES["one expert takes all, the others are empty"], Emulator(), monkeypatch, needs=needs)


def test_a_pre_activation_that_is_made_again_gives_the_same_bits(monkeypatch):
    tensors, dout = make(CASES["ids of other ranks, H and I of partial tiles"], torch.bfloat16)
    kept, made_again = (run_hopper(tensors, dout, Emulator(), monkeypatch, NEEDS, keep) for keep in (True, False))
    assert all(torch.equal(kept[name], made_again[name]) for name in kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_of_weights_are_added_to_what_is_there(dtype, monkeypatch):
    tensors, dout = make(CASES["ids of other ranks, H and I of partial tiles"], torch.bfloat16)
    before = [torch.randn(each.shape).to(dtype) for each in tensors[1:3]]
    totals = [each.clone() for each in before]
    plain = run_hopper(tensors, dout, Emulator(), monkeypatch, NEEDS)
    found = run_hopper(tensors, dout, Emulator(), monkeypatch, ("x", "topk_weights"), totals=totals)
    assert all(torch.equal(found[name], plain[name]) for name in ("out", "x", "topk_weights"))
    exact = run_reference(tensors, dout, torch.float64, NEEDS)
    for name, start, total in zip(("gate_up", "down"), before, totals, strict=True):
        wide = start.double() + exact[name]
        # what autograd would add: the gradient in the weights' dtype, rounded again if the sum is narrow
        assert_close(name, total, (start.float() + plain[name].float()).to(dtype), wide)


def test_an_empty_batch_and_routes_without_an_expert_give_zeros(monkeypatch):
    for tokens in (0, 5):
        case = (tokens, 64, 64, 3, 2, lambda tokens, top_k, *_: torch.full((tokens, top_k), 7), True)
        check(case, Emulator(), monkeypatch)


def test_x_may_be_a_slice_at_any_address(monkeypatch):
    tensors, dout = make((20, 64, 64, 3, 2, balanced, True), torch.bfloat16)
    expected = run_hopper(tensors, dout, Emulator(), monkeypatch, NEEDS)
    for width, begin in ((65, 1), (128, 32)):
        wide = torch.full((20, width), float("nan"), dtype=torch.bfloat16)
        wide[:, begin : begin + 64] = tensors[0]
        found = run_hopper([wide[:, begin : begin + 64], *tensors[1:]], dout, Emulator(), monkeypatch, NEEDS)
        assert all(torch.equal(found[name], expected[name]) for name in expected)


PIECES, ROWS, ACTIVATION, WEIGHTS = "sm90_pieces", "sm90_rows", "sm90_activation", "sm90_weights"
PLANTED = {  # the module, lines of its source, and what they become
    "operands are read before they have come": (
        PIECES,
        "        mbarrier.wait(full.index(stage), phase)\n        if",
        "        if",
    ),
    "a stage is released before its product has run": (
        PIECES,
        "mbarrier.arrive(empty.index((stage + (STAGES - 1)) % STAGES), count=1, pred=step > 0)",
        "mbarrier.arrive(empty.index(stage), count=1, pred=step + 1 < steps)",
    ),
    "the last stage of a tile is never released": (
        PIECES,
        "    mbarrier.arrive(empty.index((stage + (STAGES - 1)) % STAGES), count=1, pred=steps > 0)\n",
        "",
    ),
    "a consumer without rows leaves its stages": (
        PIECES,
        "        mbarrier.arrive(empty.index(stage), count=1)\n        stage, phase",
        "        stage, phase",
    ),
    "the loader does not wait for a free stage": (
        PIECES,
        "            mbarrier.wait(empty.index(stage), phase ^ 1)\n",
        "",
    ),
    "a tile is announced before an earlier one has been taken": (
        PIECES,
        "    mbarrier.wait(posted.index(QUEUE + slot), ((turn // QUEUE) & 1) ^ 1)\n",
        "",
    ),
    "a tile is taken before it has been announced": (
        PIECES,
        "    mbarrier.wait(posted.index(slot), (turn // QUEUE) & 1)\n",
        "",
    ),
    "nobody is told that there are no more tiles": (PIECES, "    post(queue_s, posted, turn, -1, 0, WARPS)\n", ""),
    "the last ticket is not given back": (PIECES, "        gl.store(counter, 0)\n", "        pass\n"),
    "the bytes of half a tile are expected": (PIECES, "(256 + 128) * 64 * 2", "(256 + 64) * 64 * 2"),
    "a chunk is overwritten before it has left": (
        PIECES,
        "        tma.store_wait(CHUNKS - 1)\n",
        "",
    ),
    "the tile before has not left": (ROWS, "            tma.store_wait(0)\n            thread_barrier()\n", ""),
    "the activation does not wait for the product": (
        ACTIVATION,
        "mbarrier.wait(done.index(which), gl.where(which == 0, parity_0, parity_1), pred=group % 4 == 0)",
        "pass",
    ),
    "the product does not wait for the activation": (
        ACTIVATION,
        "            mbarrier.wait(free.index(which), (handed & 1) ^ 1)\n",
        "",
    ),
    "the activation gives its tile back too early": (
        ACTIVATION,
        "free.index(which), count=1, pred=group % 4 == 3",
        "free.index(which), count=1, pred=group % 4 == 2",
    ),
    "the activation never gives its tile back": (
        ACTIVATION,
        "            mbarrier.arrive(free.index(which), count=1, pred=group % 4 == 3)\n",
        "",
    ),
    "gates and ups are read before they have come": (
        ACTIVATION,
        "                mbarrier.wait(loaded.index(chunk), phase)\n",
        "",
    ),
    "gates and ups are sent for before they are read": (
        ACTIVATION,
        "                mbarrier.wait(loaded.index(chunk), phase)\n",
        "                mbarrier.wait(loaded.index(chunk), phase)\n                "
        "load_piece(pre_desc, load_row, load_column + chunk * 64, pre_s, loaded, chunk, I, has_next)\n",
    ),
    "gates and ups are sent for behind the last tile": (ACTIVATION, "chunk, I, has_next)", "chunk, I, True)"),
    "gates and ups of the wrong tile": (ACTIVATION, "gl.where(is_last, next_row, row", "gl.where(is_last, row, row"),
    "gathered rows are not waited for": (
        WEIGHTS,
        "            async_copy.mbarrier_arrive(full.index(stage), increment_count=False)\n",
        "            mbarrier.arrive(full.index(stage), count=128)\n",
    ),
    "the weights' tile before has not left": (WEIGHTS, "        tma.store_wait(0)\n        thread_barrier()\n", ""),
}
MODULES = {"sm90_rows": sm90_rows, "sm90_activation": sm90_activation, "sm90_weights": sm90_weights}


def load_planted(name, text, folder, monkeypatch):
    path = folder / f"{name}.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(f"planted_{name}", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("bug", PLANTED)
def test_the_emulator_catches_a_planted_bug(bug, tmp_path, monkeypatch):
    where, right, wrong = PLANTED[bug]
    folder = Path(sm90_gluon.__file__).parent
    source = (folder / f"{where}.py").read_text()
    assert source.count(right) == 1, "the planted bug no longer fits the kernel"
    planted = load_planted(where, source.replace(right, wrong), tmp_path, monkeypatch)
    modules = dict(MODULES)
    if where == PIECES:
        for name in MODULES:
            text = (folder / f"{name}.py").read_text().replace("tilestack.kernels.moe.sm90_pieces", planted.__name__)
            modules[name] = load_planted(name, text, tmp_path, monkeypatch)
    else:
        modules[where] = planted
    for module in modules.values():
        for function in ("up", "multiply", "activation_backward", "outer"):
            if hasattr(module, function):
                monkeypatch.setattr(sm90_gluon, function, getattr(module, function))
    kernels = tuple((modules[module.__name__.rsplit(".", 1)[1]], name) for module, name in KERNELS)
    monkeypatch.setattr(sys.modules[__name__], "KERNELS", kernels)
    with pytest.raises(AssertionError):  # DeadlockError and ProtocolError are assertions too
        for seed in (0, 1):  # a tile's steps all fit into the ring
            check((300, 128, 320, 1, 1, balanced, True), Emulator(seed), monkeypatch)
        check((200, 384, 320, 2, 1, skewed, True), Emulator(), monkeypatch)  # more steps than stages, several tiles
        check((40, 64, 64, 20, 1, one_takes_all, True), Emulator(), monkeypatch)  # many tiles without a step
