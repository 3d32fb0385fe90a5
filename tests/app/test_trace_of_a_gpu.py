"""`tilestack trace` on what the profiler recorded on an H100: kernels come to the op and the module that launched them.

The recordings are of one layer of Qwen3-30B-A3B's shape with its full vocabulary, two steps of each: tilestack, with
two micro-batches of packed documents and recomputed activations; plain transformers, with one micro-batch. Of the host,
only what launches something was kept.
"""

import gzip
import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from app.test_trace import assert_consistent, entries
from tilestack.app.trace.attribution import CUBLAS, CUDNN, CUTLASS, DISTRIBUTED, KERNELS, LIBRARIES, MODEL, OTHER, OURS
from tilestack.app.trace.summary import Step, summarise
from tilestack.app.trace.terminal import show
from tilestack.app.trace.words import kernel_name

LENGTHS = (700, 1200, 500, 1700, 1900, 300, 1892)
LIMITS = {"matmul_tflops": 797.0, "copy_gbps": 3006.0}


def recorded(name: str) -> dict:
    return json.loads(gzip.decompress((Path(__file__).parent / "traces" / f"{name}.json.gz").read_bytes()))


def figures(trace: dict) -> dict:
    return summarise(trace, True, Step(sum(LENGTHS), 1e12, sum(each**2 for each in LENGTHS) / 2), LIMITS)


@pytest.fixture(scope="module")
def ours():
    return figures(recorded("h100-tilestack-recomputing"))


@pytest.fixture(scope="module")
def theirs():
    return figures(recorded("h100-transformers-packed"))


def entry(run: dict, layer: str, what: str) -> dict:
    return next(each for each in entries(run, layer) if each["what"] == what)


def owners(entry: dict) -> dict[str, float]:
    found: dict[str, float] = {}
    for kernel in entry["kernels"]:
        found[kernel["owner"]] = found.get(kernel["owner"], 0) + kernel["ms"]
    return found


def test_totals_are_the_sums_of_what_they_are_made_of_and_everything_has_a_place(ours, theirs):
    for run in (ours, theirs):
        assert_consistent(run)
        assert run["steps"] == 1 and run["busy_ms"] <= run["device_ms"]
        assert all(layer["layer"] != OTHER for layer in run["layers"])


def test_our_kernels_come_to_the_op_that_launched_them(ours):
    found = {each["what"]: (each["implementation"], each["kernels"]) for each in entries(ours, KERNELS)}
    assert {op: implementation for op, (implementation, _) in found.items()} == {
        "attention": "tilestack", "moe": "tilestack", "router": "tilestack-triton", "rms_norm": "tilestack-triton",
        "qk_norm_rope": "tilestack-triton", "linear_cross_entropy": "tilestack-triton", "adamw": "tilestack-triton",
    }  # fmt: skip
    for op, kernel in (
        ("attention", "attention_backward_kernel"), ("moe", "moe_up_sm90_kernel"), ("adamw", "adamw_kernel"),
        ("router", "router_fwd_kernel"), ("rms_norm", "rms_norm_bwd_kernel"),
    ):  # fmt: skip
        assert any(each["name"] == kernel and each["owner"] == OURS for each in found[op][1])
    assert all(OURS in owners(each) for each in entries(ours, KERNELS))
    assert not any(OURS in owners(each) for layer in (MODEL, LIBRARIES, DISTRIBUTED) for each in entries(ours, layer))


def test_products_inside_an_op_are_its_own_and_still_cublas_s(ours):
    head = owners(entry(ours, KERNELS, "linear_cross_entropy"))
    assert head[CUBLAS] > head[OURS] > 0
    assert owners(entry(ours, LIBRARIES, "attention projections")).keys() >= {CUBLAS}


def test_what_the_backward_pass_computes_again_is_told_apart(ours, theirs):
    for layer, what in ((KERNELS, "moe"), (KERNELS, "attention"), (LIBRARIES, "attention projections")):
        found = entry(ours, layer, what)
        assert found["recompute_ms"] == pytest.approx(found["forward_ms"], rel=0.1)
        assert found["backward_ms"] > 1.5 * found["forward_ms"]
    assert all(each["recompute_ms"] == 0 for layer in theirs["layers"] for each in layer["entries"])


def test_rates_are_those_of_the_shapes_and_stay_below_what_the_device_can_do(ours, theirs):
    for run in (ours, theirs):
        for layer in run["layers"]:
            for each in layer["entries"]:
                if layer["layer"] not in (KERNELS, LIBRARIES):
                    assert each["of_ceiling"] is None
                elif each["of_ceiling"] is not None:
                    assert each["of_ceiling"] < 1.05, each["what"]
    # 30 bytes a parameter: the gradients of two micro-batches are summed in float32
    optimizer = entry(ours, KERNELS, "adamw")
    parameters = 2 * 151936 * 2048 + 128 * 3 * 2048 * 768 + 2048 * 128 * (32 * 2 + 4 * 2) + 128 * 2048
    assert optimizer["gbps"] == pytest.approx(30 * parameters / optimizer["ms"] / 1e6, rel=1e-3)
    head = entry(ours, KERNELS, "linear_cross_entropy")
    assert head["tflops"] == pytest.approx(2 * 3 * 2 * 8192 * 2048 * 151936 / head["ms"] / 1e9, rel=1e-3)


def test_the_engine_has_its_own_place(ours):
    assert {"gradient accumulation", "gradient norm"} <= {each["what"] for each in entries(ours, DISTRIBUTED)}
    assert ours["host_waits"] == 0 and ours["host_ahead_us"] > 1000


def test_transformers_runs_on_the_libraries_and_on_many_small_kernels(theirs):
    assert owners(entry(theirs, LIBRARIES, "attention")).keys() >= {CUDNN}
    assert owners(entry(theirs, LIBRARIES, "experts: products")).keys() >= {CUTLASS}
    assert [each["what"] for each in entries(theirs, KERNELS)] == ["adamw"]
    assert next(each["share"] for each in theirs["layers"] if each["layer"] == MODEL) > 0.4
    assert theirs["host_waits"] > 0


def test_a_kernel_without_a_launch_is_shown_and_shares_still_add_up():
    trace = recorded("h100-tilestack-recomputing")
    kernel = [event for event in trace["traceEvents"] if event.get("name") == "adamw_kernel"][-1]
    kernel["args"]["correlation"] = -1
    run = figures(trace)
    assert_consistent(run)
    (lost,) = entries(run, OTHER)
    assert lost["ms"] == pytest.approx(kernel["dur"] / 1e3) and run["layers"][-1]["layer"] == OTHER


def test_collectives_belong_to_the_distributed_box():
    trace = recorded("h100-tilestack-recomputing")
    kernel = [event for event in trace["traceEvents"] if event.get("name") == "adamw_kernel"][-1]
    kernel["name"] = "ncclDevKernel_ReduceScatter_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)"
    found = entry(figures(trace), DISTRIBUTED, "collectives")
    assert found["kernels"][0]["owner"] == "NCCL" and found["ms"] == pytest.approx(kernel["dur"] / 1e3)


def test_a_trace_of_one_step_is_refused():
    trace = recorded("h100-transformers-packed")
    steps = [event for event in trace["traceEvents"] if event.get("name") == "tilestack step"]
    trace["traceEvents"].remove(steps[0])
    with pytest.raises(ValueError, match="at least 2 steps, it has 1"):
        figures(trace)


@pytest.mark.parametrize("width", [60, 80, 200])
def test_the_terminal_shows_every_box_at_any_width(ours, width):
    run = ours | {"name": "tilestack", "step_ms": 9.0, "tokens_per_s": 1e5, "tflops": 500.0, "of_ceiling": 0.6,
                  "peak_gib": 12.0, "parameters": 10**9}  # fmt: skip
    console = Console(width=width, record=True, file=io.StringIO())
    device = {"name": "NVIDIA H100 80GB HBM3", "type": "cuda", "processes": 1}
    show({"device": device, "ceilings": LIMITS | {"dtype": "bfloat16"}, "runs": [run]}, console)
    text = console.export_text()
    assert all(
        box in text for box in ("APPLICATION", "DISTRIBUTED TRAINING", "OPTIMIZED KERNELS", "CUDA, cuBLAS, cuDNN")
    )
    assert "never waits" in " ".join(text.split()) or width == 60
    assert all(len(line) <= width for line in text.splitlines())


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("adamw_kernel", "adamw_kernel"),
        ("void at::native::(anonymous namespace)::f<4, c10::BFloat16>(int)", "f<4, BFloat16>(int)"),
        ("_ZN7cutlass13device_kernelIN2at4cuda6detailE", "cutlass::device_kernel<...>"),
        ("k" * 200, "k" * 93 + "..."),
    ],
)
def test_kernels_have_names_that_can_be_read(name, shown):
    assert kernel_name(name) == shown
