"""What ptxas makes of the inner loop of the Hopper forward: the order and the number of its instructions."""

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


@pytest.fixture(scope="module")
def loops():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, str(Path(__file__).with_name("hopper_loops.py")), *INSTRUCTIONS]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def places(loop, pattern):
    return [place for place, text in enumerate(loop) if re.search(pattern, text)]


@pytest.mark.parametrize("head_dim", INSTRUCTIONS)
def test_the_loop_is_short_and_keeps_everything_in_registers(loops, head_dim):
    loop = loops[head_dim]
    assert len(loop) <= INSTRUCTIONS[head_dim]
    assert not places(loop, r"\b(STL|LDL)\b")
    assert len(places(loop, r"MUFU\.EX2")) <= 66
    assert len(places(loop, r"\b(IMAD\.)?MOV\b")) <= 8  # P and out stay where wgmma wants them
    assert not places(loop, r"\bPRMT\b")  # P is narrowed in pairs


@pytest.mark.parametrize("head_dim", INSTRUCTIONS)
def test_products_are_not_serialised_and_exponentials_run_under_p_v(loops, head_dim):
    loop = loops[head_dim]
    scores_there, out_there = places(loop, r"WARPGROUP\.DEPBAR")  # serialised wgmma has a wait for each
    products = places(loop, "HGMMA")
    exponentials = places(loop, r"MUFU\.EX2")
    assert max(products) < scores_there < min(exponentials)
    assert max(exponentials) < out_there
    of_scores = [place for place in products if "tnspB" not in loop[place]]
    of_out = [place for place in products if "tnspB" in loop[place]]
    assert max(of_scores) < min(of_out)
    scaling = places(loop, r"\bFMUL\b.*")
    assert sum(max(of_scores) < place < min(of_out) for place in scaling) >= int(head_dim) // 2
