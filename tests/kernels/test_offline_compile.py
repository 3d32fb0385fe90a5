"""Every Triton kernel compiles for every target within its budgets, on a machine without a GPU."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton exists for Linux only")

from tilestack.testing import offline
from tilestack.testing.cases import all_cases

ROOT = Path(__file__).parents[2]
# sm_86 and sm_89 have sm_80's instructions and sm_120's tiles: here attention alone goes there, slowly every op
LIKE_OTHERS = ("sm_86", "sm_89")
LARGE = ("attention", "moe")  # hundreds of kernels with every real shape: a test, and a limit of time, for each target
TARGETS = tuple(each for each in offline.TARGETS if each not in LIKE_OTHERS)
# (kernel, target): how many spills are allowed, and why. A smaller number that holds must be written down.
UNEVEN = "lengths that are no multiple of 16, whose loads take more registers"
ALLOWED_SPILLS: dict[tuple[str, str], tuple[int, str]] = {
    ("attention_fwd_kernel", "sm_80"): (34, "with a left window, which needs a third loop; 9 with Triton 3.6"),
    ("attention_fwd_kernel", "sm_90"): (2, "head dimensions over 128"),
    ("attention_bwd_dq_kernel", "sm_100"): (2, UNEVEN),
    ("attention_bwd_dk_dv_kernel", "sm_80"): (32, UNEVEN),
    ("attention_bwd_dk_dv_kernel", "sm_86"): (8, UNEVEN),
    ("attention_bwd_dk_dv_kernel", "sm_89"): (8, UNEVEN),
    ("attention_bwd_dk_dv_kernel", "sm_90"): (147, "what a loop does not change; its body reloads, and stores nothing"),
    ("attention_forward_kernel", "sm_90"): (
        42,
        "packed; 20 with Triton 3.6. From item to item: loops over tiles have none, test_attention_sm90_loops.py",
    ),
    ("attention_bwd_dk_dv_kernel", "sm_100"): (85, "packed input and single queries; as on sm_90"),
    ("attention_bwd_dk_dv_kernel", "sm_120"): (16, UNEVEN),
    ("attention_kvcache_combine_kernel", "sm_80"): (3, "head dimension 256: 16 parts of a row at once"),
    ("attention_kvcache_kernel", "sm_90"): (
        16,
        "a chunk of D 128 with Triton 3.8, of D 256 with 3.6: fastest on an H100",
    ),
    ("attention_kvcache_kernel", "sm_86"): (2, "decoding with Triton 3.6 alone"),
    ("attention_kvcache_kernel", "sm_89"): (3, "with Triton 3.6 alone"),
    ("attention_kvcache_kernel", "sm_120"): (3, "decoding with Triton 3.6 alone"),
}
# with a soft cap, ALiBi or dropout; smaller tiles spill less and are slower, as an H100 showed
FEATURES = ("HAS_SOFTCAP=True", "HAS_ALIBI=True", "HAS_DROPOUT=True")
ALLOWED_SPILLS_OF_FEATURES: dict[tuple[str, str], int] = {
    ("attention_fwd_kernel", "sm_100"): 16,
    ("attention_bwd_dq_kernel", "sm_86"): 6,
    ("attention_bwd_dq_kernel", "sm_89"): 6,
    ("attention_bwd_dq_kernel", "sm_120"): 4,
    ("attention_bwd_dk_dv_kernel", "sm_90"): 245,
    ("attention_bwd_dk_dv_kernel", "sm_100"): 130,
    ("attention_bwd_dk_dv_kernel", "sm_120"): 54,
}
# with a wide window, which has three loops; from item to item too
ALLOWED_SPILLS_OF_LEFT_WINDOWS = {("attention_forward_kernel", "sm_90"): 90}


def run_compiling(*command: str) -> dict:
    """Run a Python program whose kernels are compiled, not interpreted; returns the JSON object that it prints."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)} failed:\n{done.stderr[-4000:]}"
    return json.loads(done.stdout)


def check(op: str, targets: tuple[str, ...], *more: str, all_kernels: bool = True) -> None:
    """One process for all checks of an op: starting it and compiling take the time."""
    flags = [*more, *(flag for target in targets for flag in ("--target", target))]
    found = run_compiling("-m", "tilestack.testing.offline", op, "--json", *flags)
    compiled = [offline.Compiled(**each) for each in found["compiled"]]
    assert {each.target for each in compiled} == set(targets)
    problems = [line for each in compiled for line in each.violations(allowed_spills(each))]
    problems += found["lost_variables"]
    problems += [f"{name} is launched by no case" for name in found["unreached"] if all_kernels]
    assert not problems, "\n".join(problems)


def allowed_spills(each: offline.Compiled) -> int:
    always, _ = ALLOWED_SPILLS.get((each.kernel, each.target), (0, ""))
    if "HAS_LEFT=True" in each.constexprs:
        always = max(always, ALLOWED_SPILLS_OF_LEFT_WINDOWS.get((each.kernel, each.target), 0))
    featured = any(switch in each.constexprs for switch in FEATURES)
    return max(always, ALLOWED_SPILLS_OF_FEATURES.get((each.kernel, each.target), 0) if featured else 0)


@pytest.mark.parametrize("op", all_cases())
def test_every_kernel_compiles_within_its_budgets_and_drops_no_loop_variable(op):
    check(op, TARGETS)


def test_attention_compiles_for_gpus_of_the_ampere_and_ada_generations_with_small_shared_memory():
    check("attention", LIKE_OTHERS, all_kernels=False)


def test_attention_with_every_feature_compiles_within_its_budgets():
    check("attention", ("sm_90",), "--case", "everything, long documents", all_kernels=False)


@pytest.mark.slow
@pytest.mark.parametrize("op", [op for op in all_cases() if op not in LARGE])
def test_every_kernel_compiles_within_its_budgets_for_every_real_shape_and_target(op):
    check(op, tuple(offline.TARGETS), "--thorough")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("target", offline.TARGETS)
@pytest.mark.parametrize("op", LARGE)
def test_every_kernel_of_a_large_op_compiles_within_its_budgets_for_every_real_shape(op, target):
    check(op, (target,), "--thorough", all_kernels=target == "sm_90")


def test_in_float32_no_product_is_chained_onto_the_sum_of_those_before():
    """5,000 products in one chain, which rounds at the size of the sum each time, broke the error rule on an H100."""
    found = run_compiling(str(Path(__file__).with_name("float32_chains.py")))
    assert found == {"added": 1, "ours": 0}  # a plain sum shows that Triton would


def test_planted_faults_are_found():
    found = run_compiling(str(Path(__file__).with_name("planted_kernels.py")))
    assert found["lost"] == {
        "lost_in_a_later_iteration": ["previous"],
        "lost_after_the_loop": ["previous"],
        "lost_under_a_condition": ["previous"],
        "harmless_temporary": [],
        "properly_carried": [],
    }
    (broken,) = found["violations"]
    assert "spills" in broken and "spilling on sm_90" in broken
    assert found["unreached"] == ["rms_norm_bwd_kernel", "rms_norm_fwd_kernel"]


def test_hopper_kernels_of_moe_that_no_case_launches_compile_within_their_budgets():
    assert run_compiling(str(Path(__file__).with_name("compile_moe_variants.py"))) == []


def test_amd_spills_are_read_from_the_assembly():
    text = "    .sgpr_spill_count: 2\n    .vgpr_count:     512\n    .vgpr_spill_count: 7\n"
    assert offline.amd_usage(text) == (512, 7)


def test_each_budget_is_enforced():
    fine = offline.Compiled("op", "kernel", "sm_120", "case", "", 4, 3, 255, 0, 99 * 1024, 1.0)
    assert fine.violations() == []
    worse = dataclasses.replace(fine, registers=256, spills=3, shared_bytes=99 * 1024 + 1)
    assert [line.split(": ")[1].split(",")[0] for line in worse.violations(allowed_spills=2)] == [
        "256 registers a thread",
        "3 spills",
        "101377 bytes of shared memory",
    ]
