"""The parts of `bench distributed` that need no GPU."""

from dataclasses import asdict, replace

import pytest
from bench_worker import Job, act_as_rank, tiny_step
from distributed.tiny import tiny_config

from tilestack.bench import distributed
from tilestack.bench.distributed_tables import distributed_block
from tilestack.bench.ranks import Ranks, free_ports
from tilestack.bench.results import Row

TINY = distributed.Case(layers=2, batch=2, seqlen=16)


def test_jobs_run_on_every_rank_and_a_rank_that_fails_costs_one_job():
    group = Ranks(act_as_rank, 2, free_ports())
    try:
        results = [group.run(Job("ours", what), 5) for what in ("fine", "fine", "raise", "die", "hang", "fine")]
    finally:
        group.stop()
    assert results == [
        ["0", "2"],
        ["0", "2"],
        "rank 1: RuntimeError: cannot",
        "rank 1: the process ended with exit code 7",
        "rank 1: no answer within 5 s",
        ["0", "2"],
    ]


def test_what_collectives_hide_behind_is_what_runs_at_the_same_time():
    spans = [("gemm", 0, 4000), ("ncclDevKernel_AllReduce", 3000, 6000), ("adamw", 8000, 10000)]
    assert distributed.shares(spans) == {"collective_ms": 3.0, "exposed_ms": 2.0, "idle_ms": 2.0}
    assert distributed.shares([]) == {}


def test_ranks_have_different_rows_unless_they_share_them():
    def first(case, rank):
        return distributed.micro_batches(case, 50, rank, distributed.torch.device("cpu"))[0]

    own = [first(TINY, rank) for rank in (0, 1)]
    assert not own[0]["input_ids"].equal(own[1]["input_ids"])
    assert own[0]["num_items"] == 2 * 2 * 15
    assert own[0]["cu_seqlens"].tolist() == [0, 16, 32] and own[0]["labels"][0, 16] == -100
    shared = [first(replace(TINY, sequence_parallel=2, zero=3), rank) for rank in (0, 1)]
    assert shared[0]["input_ids"].equal(shared[1]["input_ids"])
    assert shared[0]["num_items"] == 2 * 15


def test_jobs_that_share_processes_agree_on_whether_ranks_share_rows():
    jobs = distributed.jobs_of(2, layers=4, large=8, repeats=10)
    timed = [job for job in jobs if job.kind == "step"]
    for place in {distributed.place_of(job) for job in timed}:
        cases = [job.case for job in timed if distributed.place_of(job) == place]
        assert len({case.sequence_parallel for case in cases}) == len({case.gpus for case in cases}) == 1
    assert len({(job.implementation, job.case) for job in timed}) == len(timed)
    first, second, *_ = timed
    assert distributed.jobs_of(2, 4, 8, 10)[0].case.gpus == 2, "the file is named by the first row"
    assert first.case == replace(second.case, gpus=1, zero=0), "the same step on one GPU and on both comes first"


def test_a_step_on_one_process_is_timed_and_described():
    (row,) = distributed.time_step(distributed.Job("tilestack", replace(TINY, gpus=1, zero=0), 2), tiny_config())
    assert row.ms_min <= row.ms_median <= row.ms_max
    assert len(row.losses) == distributed.WARMUP
    assert row.tokens_per_s == pytest.approx(32 / row.ms_median * 1e3)
    assert "1 GPUs, 2 layers, 2 x 16, ZeRO-0" in distributed.describe(row)
    failed = Row("step", row.case, "tilestack", "step", error="full")
    assert distributed.describe(failed).endswith("checkpointing none: full")


@pytest.mark.slow
def test_both_implementations_run_on_two_ranks():
    cases = [
        ("tilestack", replace(TINY, expert_parallel=2)),
        (distributed.RIVAL, TINY),
        (distributed.RIVAL, replace(TINY, zero=3, checkpointing="full")),
        # deeper than any rank may have whole
        ("tilestack", replace(TINY, layers=24, expert_parallel=2, moments="8bit", master_weights=False)),
    ]
    jobs = [distributed.Job(name, case, 2) for name, case in cases]
    group = Ranks(tiny_step, 2, free_ports(), distributed.import_all)
    try:
        for job in jobs:
            result = group.run(job, 300)
            assert not isinstance(result, str), f"{job}: {result}"
    finally:
        group.stop()


def test_the_table_has_rates_failures_and_what_several_gpus_reach_of_one():
    def step(case, implementation="tilestack", **numbers):
        return asdict(Row("step", asdict(case), implementation, "step", **numbers))

    rates = {"ms_median": 100.0, "peak_gib": 30.0}
    alone, two = replace(TINY, gpus=1, zero=0, seqlen=4096), replace(TINY, seqlen=4096)
    rows = [
        step(alone, tflops=400.0, tokens_per_s=1000.0, **rates),
        step(two, tflops=380.0, tokens_per_s=950.0, exposed_ms=2.0, idle_ms=1.0, losses=[9.5, 9.26], **rates),
        step(replace(two, zero=3), distributed.RIVAL, tflops=100.0, tokens_per_s=250.0, losses=[9.5, 9.25], **rates),
        step(replace(two, expert_parallel=2), error="rank 1: out | of\nmemory"),
        asdict(Row("link", {"collective": "all_gather", "bytes": 1 << 28, "gpus": 2}, "nccl", "both", gbps=243.0)),
        asdict(Row("failure", {"harm": "killed", "gpus": 2, "timeout_s": 8}, "tilestack", "step", ms_median=300.0)),
        asdict(Row("failure", {"harm": "hangs", "gpus": 2, "timeout_s": 8}, "tilestack", "step", error="see the log")),
    ]
    versions = {"torch": "2.11.0", "transformers": "5.17.0", "deepspeed": "0.19.8"}
    text = distributed_block({"device": "NVIDIA H100", "date": "2026-01-02", "versions": versions, "rows": rows})
    assert "| 2 | 2 x 4,096 | ZeRO-2 | none | tilestack | 100.0 | 950 | 380 | 30.0 | 2.0 | 1.0 |" in text
    assert "experts over 2 | none | tilestack | rank 1: out / of memory |" in text
    assert "the best of each: 3.80 times" in text and "each of 2 reaches 95.0% of its TFLOP/s" in text
    assert "Losses of the first steps, 2 layers, 2 x 4,096 a GPU" in text
    assert (
        "- transformers + DeepSpeed, ZeRO-3: 9.5000, 9.2500" in text and "- tilestack, ZeRO-2: 9.5000, 9.2600" in text
    )
    assert "of 256 MiB, GB/s: all_gather 243." in text
    assert "had ended 0.3 s later" in text and "= 8 s: the check failed" in text
