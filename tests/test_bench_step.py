"""The parts of `bench step` and `bench ops` that need no GPU."""

import dataclasses

import pytest
import torch

from tilestack.bench import ops, plots, problems, step, tables
from tilestack.bench.results import Row

SMALL = {
    "HIDDEN": 64, "INTERMEDIATE": 96, "HEADS": 4, "KV_HEADS": 2, "HEAD_DIM": 32, "VOCABULARY": 300,
    "EXPERT_PARAMETERS": (2, 8, 16),
}  # fmt: skip


@pytest.fixture
def small(monkeypatch):
    for name, value in SMALL.items():
        monkeypatch.setattr(problems, name, value)


def make(name: str) -> problems.Problem:
    return problems.adamw_problem() if name == "adamw" else getattr(problems, f"{name}_problem")(32)


@pytest.mark.parametrize("name", ["adamw", "cross_entropy", "qk_norm_rope", "rms_norm", "swiglu"])
def test_our_variant_of_a_problem_passes_its_check_and_a_wrong_scale_does_not(name, small):
    problem = make(name)
    definition, *_ = problem.variants
    right = ops.results(problem, problem.variants[definition])
    found = ops.results(problem, problem.variants["tilestack-triton"])  # on a CPU the dispatcher takes the reference
    ops.refuse_wrong(found, right)
    for index in range(len(right)):
        wrong = [each * (1.03 if place == index else 1) for place, each in enumerate(found)]
        with pytest.raises(RuntimeError, match=f"wrong: result {index} is off by"):
            ops.refuse_wrong(wrong, right)


def test_floors_are_the_bytes_of_every_tensor_once():
    t = problems.TOKENS
    assert problems.rms_norm_problem().bytes == {"forward": 4 * 2 * t * 2048, "both": 8 * 2 * t * 2048}
    assert problems.swiglu_problem().bytes["both"] == 8 * 2 * t * 6144
    tables_of_rope = 2 * 2 * t * 128
    assert problems.qk_norm_rope_problem().bytes["forward"] == 2 * 2 * t * 36 * 128 + tables_of_rope
    assert problems.adamw_problem().bytes["forward"] == 28 * 32 * 1536 * 2048
    assert problems.cross_entropy_problem().flops["both"] == 3 * 2 * t * 2048 * 151936


@pytest.mark.parametrize(("fits", "found"), [(100_000, 98_304), (95_000, 94_208)])
def test_the_longest_sequence_is_the_longest_multiple_that_fits(fits, found, monkeypatch):
    """Memory grows by 1 GiB for 2,048 tokens, beside 10 GiB; of 60 GiB are 98% of 100,352 tokens predicted."""

    def peak(model, seqlen):
        if seqlen > fits:
            raise torch.OutOfMemoryError("full")
        return 10 + seqlen / 2048

    device = type("Device", (), {"total_memory": 60 * 2**30})
    monkeypatch.setattr(step, "_peak_gib", peak)
    monkeypatch.setattr(step, "build", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: device)
    (row,) = step.longest_sequence("tilestack", step.StepCase(checkpointing=True), 1)
    assert row.case["seqlen"] == found and row.case["checkpointing"] and row.op == "longest_sequence"


def test_a_step_that_waits_for_the_gpu_is_refused_and_what_follows_may_wait_again(monkeypatch):
    modes = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def waits():
        assert modes == ["error"]
        raise RuntimeError("called a synchronizing CUDA operation")

    with pytest.raises(RuntimeError, match="synchronizing"):
        step.refuse_waits(waits)
    assert modes == ["error", "default"]


def test_no_sequence_is_tried_that_is_longer_than_a_step_may_take(monkeypatch):
    device = type("Device", (), {"total_memory": 600 * 2**30})
    monkeypatch.setattr(step, "_peak_gib", lambda model, seqlen: 10 + seqlen / 2048)
    monkeypatch.setattr(step, "build", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: device)
    (row,) = step.longest_sequence("tilestack", step.StepCase(), 1)
    assert row.case["seqlen"] == step.LONGEST_TRIED


def test_the_losses_and_the_longest_sequences_are_measured_of_ours_and_plain_transformers_alone():
    cases = [step.StepCase(), step.StepCase(batch=1)]
    assert {name for names, _, _ in step.PROCESSES for name in names} == set(step.IMPLEMENTATIONS)
    (names, kinds, which), *others = step.PROCESSES
    found = [job.kind for job in step.jobs_of(names, kinds, cases[which], 20)]
    assert found == ["time"] * 6 + ["optimizer"] + ["longest"] * 4 + ["losses"] * 2
    of_others = [job for names, kinds, which in others for job in step.jobs_of(names, kinds, cases[which], 20)]
    assert {(job.implementation, job.case.batch) for job in of_others} == {
        (name, batch) for name in ("liger", "transformers-compile") for batch in (1, 4)
    }
    assert len(of_others) == 4 and {job.kind for job in of_others} == {"time"}


def test_what_is_compared_is_timed_one_after_the_other_on_the_first_case_first():
    cases = [step.StepCase(), step.StepCase(batch=1)]
    names, kinds, _ = step.PROCESSES[0]
    jobs = step.jobs_of(names, kinds, cases, 20)
    assert [job.implementation for job in jobs[:3]] == ["transformers", "tilestack", step.GRAPH]
    assert {job.case for job in jobs[:3]} == {cases[0]}


def _run(bench: str, rows: list[Row]) -> dict:
    return {
        "bench": bench, "device": "NVIDIA H100", "date": "2026-01-02T03:04:05+00:00",
        "versions": {"torch": "2.11.0", "triton": "3.6.0", "transformers": "5.17.0"},
        "ceilings": {"matmul_tflops": 800.0, "copy_gbps": 3000.0}, "rows": [dataclasses.asdict(row) for row in rows],
    }  # fmt: skip


def _step_run() -> dict:
    rates = {"ms_min": 1.0, "ms_max": 2.0, "tflops": 500.0, "peak_gib": 13.0, "tokens_per_s": 1e5}
    first, long = step.StepCase(), step.StepCase(batch=1, seqlen=32768)
    longest = step.StepCase(batch=1, seqlen=20480).as_dict()
    rows = [
        Row("step", first.as_dict(), "transformers", "step", ms_median=220.0, **rates),
        Row("step", long.as_dict(), "transformers", "step", error="OutOfMemoryError: CUDA | full\nof it"),
        Row("longest_sequence", longest, "transformers", "step", peak_gib=78.0),
        Row("step", first.as_dict(), "tilestack", "step", ms_median=100.0, **rates),
        Row("longest_sequence", longest | {"seqlen": 204800}, "tilestack", "step", peak_gib=77.0),
        Row("optimizer", first.as_dict() | {"parameters": 3e9}, "tilestack", "step", ms_median=30.0, gbps=2800.0),
    ]
    return _run("step", rows)


def test_the_step_table_has_cases_together_ratios_and_what_did_not_fit(monkeypatch):
    monkeypatch.setattr(tables, "_runs", lambda bench: [_step_run()])
    text = tables.step_table()
    assert text.index("4 x 4096 | transformers") < text.index("4 x 4096 | tilestack") < text.index("1 x 32768")
    assert "| tilestack | 100.0 | 100,000 | 500 | 13.0 | 2.20 |" in text
    assert "OutOfMemoryError: CUDA / full of it" in text
    assert "| 4 | no | tilestack | 204,800 | 77.0 | 10.0 |" in text
    assert "30.00 ms, 2800 GB/s, 1.07 times" in text


def test_the_longest_sequences_of_a_run_without_times_have_a_table_of_their_own(monkeypatch):
    rows = [row for row in _step_run()["rows"] if row["op"] == "longest_sequence"]
    monkeypatch.setattr(tables, "_runs", lambda bench: [_step_run() | {"rows": rows}] if bench == "longest" else [])
    text = tables.longest_table()
    assert "| 4 | no | tilestack | 204,800 | 77.0 | 10.0 |" in text and text.startswith("NVIDIA H100")
    assert tables.step_table() == "Not measured yet.\n"


def test_the_table_of_ops_has_rates_and_their_shares(monkeypatch):
    case = {"case": "16384 tokens"}
    rows = [
        Row("adamw", {"case": "grid"}, "reference", "forward", ms_median=1.105),
        Row("rms_norm", case, "liger", "forward", ms_median=0.1, gbps=2700.0, peak_gib=0.1),
        Row("rms_norm", case, "liger", "both", ms_median=0.2, gbps=2400.0, peak_gib=0.2),
        Row("linear_cross_entropy", case, "liger", "both", ms_median=50.0, tflops=600.0, peak_gib=1.2),
    ]
    monkeypatch.setattr(tables, "_runs", lambda bench: [_run("ops", rows)])
    text = tables.ops_table()
    assert "| adamw | grid | reference | 1.105 |  |" in text
    assert "| liger | 0.100 | 2700 GB/s (90%) | 0.200 | 2400 GB/s (80%) | 0.20 |" in text
    assert "| liger |  |  | 50.000 | 600 TFLOP/s (75%) | 1.20 |" in text


def test_the_picture_of_a_step_is_drawn_from_what_was_timed(tmp_path):
    plots.plot_step(_step_run(), tmp_path / "step.png")
    assert (tmp_path / "step.png").stat().st_size > 10_000
