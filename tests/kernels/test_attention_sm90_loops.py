"""What ptxas makes of the inner loops of the Hopper forward: the order and the number of their instructions."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton exists for Linux only")

ROOT = Path(__file__).parents[2]
INSTRUCTIONS = {"64": 450, "128": 480}  # of a tile of 128 keys: 64 scores a thread, of which each takes about six
MASKED = {
    "64": 3 * 64,
    "128": 3 * 64,
    "128:1024": 4 * 64,
}  # more where tiles are masked: comparisons, a choice, the rest


@pytest.fixture(scope="module")
def loops():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, str(Path(__file__).with_name("hopper_loops.py")), *MASKED]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def places(loop, pattern):
    return [place for place, text in enumerate(loop) if re.search(pattern, text)]


@pytest.mark.parametrize("kind", MASKED)
def test_loops_that_mask_are_short_too_and_keep_everything_in_registers(loops, kind):
    consumers, parts = {"64": (3, 2), "128": (2, 2), "128:1024": (2, 3)}[kind]
    assert len(loops[kind]) == consumers * parts
    for loop in loops[kind]:
        assert len(loop) <= INSTRUCTIONS[kind.split(":")[0]] + MASKED[kind]
        assert not places(loop, r"\b(STL|LDL)\b")
        assert len(places(loop, r"WARPGROUP\.DEPBAR")) == 2


@pytest.mark.parametrize("head_dim", INSTRUCTIONS)
def test_the_loop_is_short_and_keeps_everything_in_registers(loops, head_dim):
    loop = loops[head_dim][0]
    assert len(loop) <= INSTRUCTIONS[head_dim]
    assert not places(loop, r"\b(STL|LDL)\b")
    assert len(places(loop, r"MUFU\.EX2")) <= 66
    assert len(places(loop, r"\b(IMAD\.)?MOV\b")) <= 8  # P and out stay where wgmma wants them
    assert not places(loop, r"\bPRMT\b")  # P is narrowed in pairs


@pytest.mark.parametrize("head_dim", INSTRUCTIONS)
def test_products_are_not_serialised_and_nothing_stands_between_them_and_the_chain_but_what_is_free(loops, head_dim):
    loop = loops[head_dim][0]
    products = places(loop, "HGMMA")
    waits = places(loop, r"WARPGROUP\.DEPBAR")
    assert len(waits) == 2  # serialised wgmma has a wait for each product
    assert max(products) < min(waits) < min(places(loop, r"MUFU\.EX2"))
    of_scores = [place for place in products if "tnspB" not in loop[place]]
    of_out = [place for place in products if "tnspB" in loop[place]]
    assert max(of_scores) < min(of_out)
    free = range(max(of_scores), min(of_out))  # the tensor cores work on the scores
    assert sum(place in free for place in places(loop, r"\bFMUL\b")) == int(head_dim) // 2  # out is rescaled here
    if head_dim == "128":
        assert sum(place in free for place in places(loop, r"\bF2FP\b")) >= 24  # and most of P narrowed


@pytest.mark.parametrize("head_dim", INSTRUCTIONS)
def test_rescaling_is_jumped_over_where_no_maximum_has_grown(loops, head_dim):
    loop = loops[head_dim][0]
    (vote,) = places(loop, r"\bVOTE\b")
    jump = next(place for place in places(loop, r"\bBRA\b") if place > vote)
    assert set(places(loop, r"\bFMUL\b")) >= set(range(jump + 1, jump + 1 + int(head_dim) // 2))
