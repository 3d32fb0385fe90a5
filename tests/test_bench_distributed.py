"""The parts of `bench distributed` that need no GPU."""

from dataclasses import replace

import pytest
from bench_worker import Job, act_as_rank, tiny_step
from distributed.tiny import tiny_config

from tilestack.bench import distributed
from tilestack.bench.ranks import on_ranks
from tilestack.bench.results import Row

TINY = distributed.Case(layers=2, batch=2, seqlen=16)


def test_jobs_run_on_every_rank_and_a_rank_that_fails_costs_one_job():
    jobs = [Job("ours", what) for what in ("fine", "raise", "die", "hang", "fine")]
    results = [result for _, result in on_ranks(jobs, act_as_rank, 2, patience_s=5)]
    assert results == [
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
    groups = distributed.jobs_of(2, layers=4, large=8, repeats=10)
    for group in groups:
        timed = [job.case for job in group if job.kind == "step"]
        assert len({case.sequence_parallel for case in timed}) == len({case.gpus for case in timed}) == 1
    cases = [(job.implementation, job.case) for group in groups for job in group]
    assert len(cases) == len(set(cases))
    alone = next(case for _, case in cases if case.gpus == 1)
    assert any(replace(case, gpus=1, zero=0) == alone for _, case in cases if case.gpus == 2), "the same step on both"


def test_a_step_on_one_process_is_timed_and_described():
    (row,) = distributed.time_step(distributed.Job("tilestack", replace(TINY, gpus=1, zero=0), 2), tiny_config())
    assert row.ms_min <= row.ms_median <= row.ms_max
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
    ]
    jobs = [distributed.Job(name, case, 2) for name, case in cases]
    for job, result in on_ranks(jobs, tiny_step, 2, 100):
        assert not isinstance(result, str), f"{job}: {result}"
