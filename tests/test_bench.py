"""The parts of the benchmarks that need no GPU."""

import dataclasses
import math

import pytest
import torch
from bench_worker import Job, act
from PIL import Image

from tilestack.bench import attention, attention_check, isolated, kernel_tables, moe, moe_check, plots, tables
from tilestack.bench.attention_cases import AttentionCase, cases, document_lengths, make
from tilestack.bench.results import Row

DENSE = AttentionCase(2, 40, heads=4, kv_heads=2, head_dim=16)
PACKED = AttentionCase(1, 50, heads=4, kv_heads=2, head_dim=16, layout="packed", lengths=(9, 33, 8))
MOE = moe.MoeCase(96, hidden=32, intermediate=16, experts=8, top_k=2)


def test_flops_of_attention_are_those_of_the_formula():
    assert AttentionCase(4, 4096).flops("forward") == 4 * 4 * 32 * 4096**2 * 128 / 2
    assert AttentionCase(4, 4096, causal=False).flops("backward") == 2.5 * 4 * 4 * 32 * 4096**2 * 128
    documents = AttentionCase(1, 30, layout="packed", lengths=(10, 20))
    assert documents.flops("forward") == 4 * 32 * 128 * (100 + 400) / 2


def test_document_lengths_are_drawn_once_and_fill_the_tokens():
    lengths = document_lengths(65536)
    assert sum(lengths) == 65536 and min(lengths) > 0
    assert lengths == document_lengths(65536)
    assert 600 < 65536 / len(lengths) < 1600


def test_every_dense_case_has_16k_tokens_and_the_order_starts_with_the_main_shape():
    dense = [case for case in cases() if case.lengths is None]
    assert {case.batch * case.seqlen for case in dense} == {16384}
    assert cases()[0] == AttentionCase(16, 1024)
    assert set(cases(quick=True)) < set(cases())


@pytest.mark.parametrize("window", [(-1, -1), (0, 0), (15, 0), (10**6, 0)])
def test_a_causal_window_counts_the_pairs_that_it_leaves(window):
    case = AttentionCase(1, 512, heads=1, kv_heads=1, head_dim=1, window=window)
    seen = torch.ones(512, 512).tril()
    if window[0] >= 0:
        seen = seen.triu(-window[0])
    # half of S^2 where all is seen, as everywhere: half a key less for each that the last query sees
    assert case.flops("forward") / 4 == seen.sum().item() - 0.5 * seen[-1].sum().item()


@pytest.mark.parametrize(
    "case",
    [DENSE, dataclasses.replace(DENSE, causal=False), PACKED, dataclasses.replace(DENSE, window=(9, 0))],
    ids=["dense", "all keys", "packed", "window"],
)
def test_the_check_of_attention_passes_what_is_right_and_refuses_what_is_wrong(case):
    tensors = make(case, "cpu")
    truth = attention_check.truth_of(case, tensors, portable="reference")
    right = attention_check.run(attention_check.ours(case, tensors, "reference"), tensors)
    assert all(error < 0.02 for error in truth.check(case, right).values())
    for name in attention_check.NAMES:
        with pytest.raises(AssertionError, match=name):
            truth.check(case, {**right, name: right[name] * 1.05})
        elsewhere = right[name].clone()
        elsewhere.view(-1, elsewhere.shape[-1])[0] += 100  # the first sequence and head: not in the slice
        with pytest.raises(AssertionError, match="tilestack-triton"):
            truth.check(case, {**right, name: elsewhere})


def test_the_check_of_moe_passes_transformers_and_refuses_what_is_wrong():
    problem = moe.make(MOE, "cpu")
    truth = moe_check.truth_of(problem)
    assert len(truth.tokens) > 48
    errors = truth.check(problem, moe.block(problem, "reference"))
    assert errors.keys() == set(moe_check.NAMES) and all(error < 0.02 for error in errors.values())
    module = moe.transformers_block(problem, "eager")
    truth.check(problem, lambda: module(problem.x[None])[0])
    for wrong in (lambda: 1.05 * moe.block(problem, "reference")(), lambda: problem.x * problem.down.mean()):
        with pytest.raises((AssertionError, RuntimeError)):
            truth.check(problem, wrong)


def test_skewed_routing_sends_many_tokens_to_one_expert():
    case = moe.MoeCase(4096, hidden=64, intermediate=16, experts=32, top_k=4)
    busiest = {}
    for routing in moe.ROUTINGS:
        problem = moe.make(dataclasses.replace(case, routing=routing), "cpu")
        ids = (problem.x @ problem.gate.T).topk(case.top_k).indices
        busiest[routing] = ids.flatten().bincount().max().item() / (4096 * 4 / 32)
    assert busiest["random"] < 1.5 and busiest["skewed"] > 3


def test_the_roofline_is_bound_by_weights_at_few_tokens_and_by_products_at_many():
    ceilings = {"matmul_tflops": 800.0, "copy_gbps": 3000.0}
    assert moe.roofline_tflops(moe.MoeCase(32768).as_dict(), "both", ceilings) == pytest.approx(800)
    case = moe.MoeCase(16).as_dict()
    weights = 3 * (3 * 128 * 2048 * 768) * 2
    expected = 18 * 16 * 8 * 2048 * 768 / (weights / 3e12) / 1e12
    assert moe.roofline_tflops(case, "both", ceilings) == pytest.approx(expected, rel=0.01)


def test_a_variant_that_raises_dies_or_hangs_loses_only_its_own_rows():
    jobs = [Job("a", "fine"), Job("b", "raise"), Job("b", "die"), Job("a", "well"), Job("c", "hang"), Job("a", "good")]
    results = [result for _, result in isolated.one_after_another(jobs, act, patience_s=10)]
    assert results[0] == ["fine"] and results[3] == ["well"] and results[5] == ["good"]
    assert "cannot" in results[1] and "exit code 7" in results[2] and "no answer" in results[4]


def test_an_implementation_that_kills_its_process_twice_is_not_tried_again():
    jobs = [Job("b", "die"), Job("b", "die"), Job("b", "fine"), Job("a", "fine")]
    found = list(isolated.one_after_another(jobs, act, patience_s=60))
    assert [job for job, _ in found[2:]] == jobs[2:]
    assert "not tried" in found[2][1] and found[3][1] == ["fine"]


def test_jobs_side_by_side_give_their_results_in_order():
    groups = [[Job("a", "one"), Job("a", "two")], [Job("b", "die"), Job("b", "late")], [Job("c", "three")]]
    found = list(isolated.side_by_side(groups, act, patience_s=60))
    assert [job for job, _ in found] == [job for group in groups for job in group]
    results = [result for _, result in found]
    assert results[:2] == [["one"], ["two"]] and results[4] == ["three"]
    assert "exit code 7" in results[2] and "ended before" in results[3]


def _run_of_attention():
    rows = []
    for seqlen in (1024, 2048):
        case = AttentionCase(16384 // seqlen, seqlen).as_dict()
        for name, rate in (
            ("cudnn", 500.0),
            ("flash-attn-4", 510.0),
            ("tilestack", 561.0),
            ("tilestack-triton", 300.0),
        ):
            for direction in ("forward", "backward"):
                rows.append(_row("attention", case, name, direction, tflops=rate))
    rows.append(Row("attention", AttentionCase(1, 128).as_dict(), "tilestack", "both", overhead_us=123.4))
    rows.append(Row("attention", AttentionCase(4, 4096).as_dict(), "tilestack", "both", cold_s=4.56, warm_s=0.78))
    rows.append(Row("attention", PACKED.as_dict(), "xformers", "both", error="RuntimeError: a | b\nc"))
    return _record("attention", rows)


def _run_of_moe():
    rows = []
    for routing in moe.ROUTINGS:
        case = moe.MoeCase(16384, routing).as_dict()
        for name, ms in (("tilestack", 2.0), ("transformers", 8.0)):
            rows += [_row("moe", case, name, direction, ms=ms, tflops=400.0) for direction in ("forward", "both")]
    return _record("moe", rows)


def _row(op, case, name, direction, ms=1.0, tflops=1.0):
    return Row(op, case, name, direction, ms, 0.9 * ms, 1.1 * ms, tflops=tflops, peak_gib=3.0, error=0.003)


def _record(bench, rows):
    return {
        "bench": bench, "device": "NVIDIA H100", "date": "2026-01-02T03:04:05+00:00",
        "versions": {"torch": "2.11.0", "triton": "3.6.0"}, "ceilings": {"matmul_tflops": 800.0, "copy_gbps": 3000.0},
        "rows": [dataclasses.asdict(row) for row in rows],
    }  # fmt: skip


def test_the_attention_table_has_every_rate_and_the_ratio_to_the_best_rival():
    text = kernel_tables.attention_block(_run_of_attention())
    assert "| 16 x 1024 | 561 / 561 | 300 / 300 | 500 / 500 | 510 / 510 | 1.10 / 1.10 |" in text
    assert "| tilestack | 123 | 4.56 | 0.78 |" in text
    assert "RuntimeError: a / b c" in text


def test_the_moe_table_has_rates_shares_of_the_roofline_and_the_ratio_to_transformers():
    text = kernel_tables.moe_block(_run_of_moe())
    assert "| 16384 | random | tilestack | 2.00 | 400 (50%) | 2.00 | 400 (50%) | 3.0 | 4.00 |" in text
    assert "Skewed routing costs tilestack +0.0% at 16384 tokens." in text


@pytest.mark.parametrize("run", [_run_of_attention(), _run_of_moe()], ids=lambda run: run["bench"])
def test_a_picture_says_which_run_it_shows(run, tmp_path):
    path = tmp_path / "figure.png"
    plots.PLOTS[run["bench"]](run, path)
    assert Image.open(path).text[plots.SOURCE] == plots.source(run)


@pytest.mark.parametrize("bench", plots.PLOTS)
def test_the_committed_pictures_are_those_of_the_result_files(bench):
    for path in tables.result_files(bench):
        shown = Image.open(tables.figure_of(path)).text[plots.SOURCE]
        assert shown == plots.source(tables.read(path)), "run `tilestack bench tables`"


def test_lines_of_the_terminal_name_the_case_and_the_rate():
    row = Row("attention", DENSE.as_dict(), "cudnn", "forward", 1.0, 0.9, 1.2, tflops=321.0, error=0.003)
    assert "2 x 40, 4/2 heads of 16, causal" in attention.describe(row) and "321 TFLOP/s" in attention.describe(row)
    limits = {"matmul_tflops": 800.0, "copy_gbps": 3000.0}
    line = moe.describe(Row("moe", moe.MoeCase(16384).as_dict(), "tilestack", "both", error="RuntimeError"), limits)
    assert "16384 tokens" in line and line.endswith("RuntimeError")
    assert math.isfinite(moe.roofline_tflops(MOE.as_dict(), "forward", limits))


def test_torch_s_kernels_get_its_layout_and_give_ours_back():
    seen = []
    call = attention._torch(lambda q, k, v: seen.append(q.shape) or q)
    q = torch.zeros(2, 5, 3, 8)
    assert call(q, q, q).shape == q.shape and seen == [(2, 3, 5, 8)]
