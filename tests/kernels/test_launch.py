"""How kernels are launched: `run` finds what Triton would find, `together` compiles what is launched, nothing else."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton exists for Linux only")

from test_offline_compile import run_compiling

from tilestack.kernels import launch
from tilestack.testing.cases import all_cases
from tilestack.testing.compare import evaluate

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PROGRAM = str(Path(__file__).with_name("launches.py"))
# host functions with several kernels that are long in the compiler, or whose first launches are many
TOGETHER = {
    "attention_backward_kernel", "prepare_kernel", "finish_kernel", "moe_layout_kernel", "moe_up_sm90_kernel",
    "moe_rows_sm90_kernel", "moe_combine_kernel", "moe_activation_bwd_sm90_kernel", "moe_dweights_kernel",
    "moe_weights_bwd_sm90_kernel", "moe_row_blocks_kernel", "moe_up_fwd_kernel", "moe_rows_kernel",
    "moe_swiglu_bwd_kernel", "moe_weights_bwd_kernel", "router_fwd_kernel", "router_fwd_statistics_kernel",
    "sort_routes_count_kernel", "sort_routes_scan_kernel", "sort_routes_place_kernel",
}  # fmt: skip


def launches_wait(monkeypatch):
    """Let every launch in a function of `together` wait for its end, as the first ones on a GPU do by themselves."""
    if torch.cuda.is_available():
        return
    monkeypatch.setattr(launch, "_key", lambda *launched: object())
    monkeypatch.setattr(launch, "_compile", lambda launches: None)


def check(cases_of_each):
    found = run_compiling(PROGRAM, str(cases_of_each))
    assert found["ops"] == sorted(all_cases())
    assert found["past launch.run"] == []
    assert found["confused"] == [], "launches of one key that Triton compiles different kernels for"
    assert found["launched otherwise"] == []
    assert found["prepared"]
    assert found["compiled twice"] == []
    assert set(found["side by side"]) >= TOGETHER
    return found


def test_a_launch_is_what_triton_would_launch_and_compiles_nothing_that_was_compiled_for_it():
    found = check(2)
    assert set(found["side by side"]) == TOGETHER
    assert not TOGETHER & set(found["alone"]), "compiled by the launch itself, though it was compiled for"
    assert found["unnoticed"] == [], "planted: keys that leave something out"
    # error, launches, threads and waiting launches that are left
    assert found["device"] == ["the device's", 0, 0, None]
    assert found["host"] == ["the host function's", 0, 0, None]
    assert found["compiler"] == ["the compiler's", 1, 0, None]
    assert found["afterwards"] == [None, 2, 0, None]
    assert found["while it compiles"] == [[None, 3, 1, None], [None, 2, 0, None]]  # the thread is the test's


@pytest.mark.slow
def test_every_small_case_of_the_grid_launches_what_triton_would_launch():
    check(10**6)


@pytest.mark.parametrize(("op", "name"), [("router", "masked"), ("sort_routes", "plain")])
def test_launches_that_wait_give_the_same_bits(op, name, monkeypatch):  # others: test_moe.py, emulated test_*_sm90*.py
    cases = all_cases()[op]
    (case,) = (each for each in cases.cases if each.name == name)
    tensors = case.make(torch.float32, DEVICE, torch.Generator().manual_seed(0))
    expected = evaluate(cases, case, tensors, "tilestack-triton")
    launches_wait(monkeypatch)
    monkeypatch.setattr(launch, "_COMPILED", {})  # on a GPU too, all is launched for the first time again
    found = evaluate(cases, case, tensors, "tilestack-triton")
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0)
