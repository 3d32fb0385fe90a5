"""The plan beside what was measured, and the benches that measure it."""

import dataclasses

import pytest
import torch
from distributed.tiny import tiny_config

from tilestack.bench import adamw, memory
from tilestack.bench.drawing import DrawnInPlace
from tilestack.bench.memory_tables import adamw_block, plan_block, planned_table, steps_with_peaks, timed_block
from tilestack.bench.results import read
from tilestack.bench.step import qwen3_30b_a3b
from tilestack.bench.tables import result_files
from tilestack.distributed.memory_model import GIB

MEASURED = [row for path in result_files("plan") for row in read(path)["rows"] if not row["error"]]
TIMED = [found for path in result_files("distributed") for found in steps_with_peaks(read(path))]


@pytest.mark.parametrize("row", MEASURED, ids=lambda row: "-".join(map(str, row["case"].values())))
def test_the_plan_is_within_8_percent_of_what_was_measured(row):
    planned = memory.predicted(memory.MemoryCase(**row["case"]))
    assert planned.allocated / GIB == pytest.approx(row["peak_gib"], rel=0.08)
    assert sum(planned.moments["loss"].values()) / GIB == pytest.approx(row["gib"]["forward"], rel=0.08)
    # when the update begins there is nothing but weights, state, gradients and ZeRO-3's bucket
    update = sum(size for part, size in planned.moments["update"].items() if part != "copies for the update")
    assert update / GIB == pytest.approx(row["gib"]["before optimizer"], rel=0.01)


@pytest.mark.parametrize(("case", "peak"), TIMED, ids=lambda each: str(getattr(each, "gpus", each)))
def test_the_plan_is_within_8_percent_of_the_steps_that_were_timed(case, peak):
    assert memory.predicted(case).allocated / GIB == pytest.approx(peak, rel=0.08)


def test_a_measurement_notes_every_stage_of_a_step(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    case = memory.MemoryCase(2, gpus=1, zero=None, micro_batch_tokens=64, seqlen=32, accumulation=2, moments="8bit")
    found = memory.measure(case, tiny_config())
    stages = {"forward", "backward", "gradient norm", "optimizer", "peak", "ms"}
    assert stages <= found.keys()


def test_no_weight_has_memory_before_the_engine_gives_a_rank_its_part(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    given = []

    def make_engine(model, *arguments):
        given.append({each.device.type for each in model.parameters()})
        raise InterruptedError

    monkeypatch.setattr("tilestack.distributed.make_engine", make_engine)
    for case in memory.FULL:
        with pytest.raises(InterruptedError):
            memory.measure(
                dataclasses.replace(case, gpus=1, zero=None, expert_parallel=1, offload=False), qwen3_30b_a3b(48)
            )
    assert given == [{"meta"}] * len(memory.FULL)


def test_a_row_has_the_fullest_rank_and_the_rate_of_the_slowest():
    case = memory.MemoryCase(8, sequence_parallel=2, accumulation=3, micro_batch_tokens=4000)
    row = memory._row(case, [{"peak": 2 * GIB, "ms": 100.0}, {"peak": GIB, "ms": 200.0}])
    assert (row.peak_gib, row.ms_median, row.tokens_per_s) == (2.0, 200.0, 4000 / 2 * 3 / 0.2)


def test_weights_drawn_in_place_are_those_of_the_name_and_the_part():
    source, parts = DrawnInPlace(0.02), [torch.empty(1000) for _ in range(4)]
    places = [("layers.0.mlp.gate_up_proj", 0), ("layers.0.mlp.gate_up_proj", 0), ("layers.0.mlp.gate_up_proj", 1000)]
    for target, place in zip(parts, [*places, ("layers.0.input_layernorm.weight", 0)], strict=True):
        source.fill(*place, target)
    assert torch.equal(parts[0], parts[1]) and not torch.equal(parts[0], parts[2])
    assert 0.018 < parts[0].std() < 0.022 and torch.equal(parts[3], torch.ones(1000))


def test_tables_have_a_line_for_each_case_also_for_one_that_failed():
    case = dataclasses.asdict(memory.MemoryCase(8, expert_parallel=2, offload=True))
    planned = memory.predicted(memory.MemoryCase(**case)).allocated / GIB
    fine = {"case": case, "error": None, "peak_gib": planned / 1.05, "gib": {"reserved": 50.0, "outside": 2.0}}
    text = plan_block({"rows": [fine, fine | {"error": "no memory"}]})
    assert "| 8 | 2 GPUs, ZeRO 2, EP 2 | 1 x 4,096 | none | float32, on host |" in text
    assert "| +5.0% | 52.0 |" in text and "| no memory |" in text
    assert planned_table().count("\n") == 2 + 12
    step = {
        "op": "step",
        "implementation": "tilestack",
        "error": None,
        "peak_gib": planned,
        "case": case | {"batch": 1},
    }
    text = timed_block({"rows": [step, step | {"implementation": "transformers"}, step | {"error": "no memory"}]})
    assert text.count("\n") == 2 + 1 and "| 8 | 2 GPUs, ZeRO 2, EP 2 | 1 x 4,096 | none | float32, on host |" in text


def test_the_bytes_of_an_update_are_what_the_tensors_hold():
    found = {
        state: adamw.bytes_moved(adamw.tensors(1024, moments, master, "cpu")) / 1024
        for state, (moments, master) in adamw.STATES.items()
    }
    scales = 2 * 2 * 4 / 256
    assert found == {
        "float32, master": 28, "bfloat16, master": 20, "bfloat16, no master": 14, "8bit, master": 16 + scales,
        "8bit, no master": 10 + scales,
    }  # fmt: skip
    row = {"case": {"state": "8bit", "parameters": 1024, "bytes": 10240}, "implementation": "tilestack-triton",
           "gbps": 2000.0, "ms_median": 0.5}  # fmt: skip
    text = adamw_block({"rows": [row], "ceilings": {"copy_gbps": 2500.0}})
    assert "| 8bit | tilestack-triton | 10.0 | 0.500 | 2000 | 80% |" in text


def test_the_check_before_the_timing_runs_the_grid(monkeypatch):
    seen = []
    monkeypatch.setattr(adamw.compare, "check", lambda op, case, *_: seen.append(case.name))
    adamw.check(torch.device("cpu"))
    assert "8-bit moments by chance" in seen and len(seen) == len(adamw.CASES.cases)
