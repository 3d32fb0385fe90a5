"""`tilestack bench numerics`: the criterion, and the runs at a size for the CPU."""

import math

import pytest
import torch
from PIL import Image

from tilestack.bench import plots, tables
from tilestack.bench.numerics import (
    FACTOR,
    FLOAT32,
    OURS,
    RIVALS,
    WINDOW,
    NumericsCase,
    jobs_of,
    judge,
    smoothed,
    train,
)  # fmt: skip

TINY = NumericsCase(
    layers=1, hidden=32, heads=2, kv_heads=1, head_dim=16, experts=4, top_k=2, expert_hidden=16, vocabulary=260,
    batch=2, seqlen=24, steps=25, warmup=2, orders=(0,),
)  # fmt: skip
STEPS = 60


def made_up(ours: float, drift: float = 0.0) -> dict:
    """Losses of two orders: rivals are 0.01 above and below, tilestack is off by `ours` and by `drift` more a step."""
    runs = {}
    for order in (0, 1):
        truth = [5 * math.exp(-step / 30) for step in range(STEPS)]
        runs[order, FLOAT32] = truth
        for sign, name in zip((1, -1), list(RIVALS)[1:], strict=True):
            runs[order, name] = [value + sign * 0.01 for value in truth]
        runs[order, OURS] = [value + ours + drift * step for step, value in enumerate(truth)]
    return runs


def test_runs_at_the_distance_of_the_rivals_pass():
    verdict = judge(made_up(0.0099))
    assert verdict.passed and verdict.inside == 1
    assert verdict.envelope == pytest.approx([0.01] * (STEPS - WINDOW + 1))
    assert verdict.worst == pytest.approx({0: 0.99, 1: 0.99})


@pytest.mark.parametrize(
    "runs", [made_up(0.021), made_up(-0.021), made_up(0.0, drift=1e-3)], ids=["above", "below", "drift"]
)
def test_runs_that_are_farther_than_the_rule_allows_fail(runs):
    verdict = judge(runs)
    assert not verdict.passed and max(verdict.worst.values()) > FACTOR


def test_one_order_that_leaves_the_envelope_is_enough_to_fail():
    runs = made_up(0.0)
    runs[1, OURS] = [value + 0.03 for value in runs[1, OURS]]
    verdict = judge(runs)
    assert not verdict.passed and verdict.worst[0] == pytest.approx(0) and verdict.inside == 0.5


def test_the_envelope_never_narrows_again():
    runs = made_up(0.0)
    name = list(RIVALS)[1]
    runs[0, name] = [value + 0.05 * (step < WINDOW) for step, value in enumerate(runs[0, name])]
    assert judge(runs).envelope[-1] == pytest.approx(0.06)


def test_differences_are_averaged_over_the_window():
    values = smoothed([1.0, *[0.0] * WINDOW], [0.0] * (WINDOW + 1))
    assert values == pytest.approx([1 / WINDOW, 0])


@pytest.fixture(scope="module")
def trained():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    runs = {(job.order, job.implementation): train(job) for job in jobs_of(TINY, "cpu")}
    torch.set_num_threads(threads)
    return runs


def test_all_runs_start_from_one_loss_and_learn(trained):
    assert {name for _, name in trained} == {*RIVALS, OURS}
    truth = trained[0, FLOAT32]
    assert sum(truth[-5:]) < sum(truth[:5])
    for losses in trained.values():
        assert len(losses) == TINY.steps
        assert losses == pytest.approx(truth, rel=2**-8), "bf16 has 8 bits"


def test_the_plot_and_the_table_say_what_the_criterion_says(tmp_path, monkeypatch):
    rows = [
        {"case": {"order": order}, "implementation": name, "losses": losses}
        for (order, name), losses in made_up(0.015).items()
    ]
    run = {"bench": "numerics", "device": "H100", "date": "2026-01-02T03:04:05", "rows": rows,
           "versions": {"torch": "2.11.0", "transformers": "5.17.0"}}  # fmt: skip
    plots.plot_numerics(run, tmp_path / "figure.png")
    assert Image.open(tmp_path / "figure.png").text[plots.SOURCE] == plots.source(run)
    monkeypatch.setattr(tables, "result_files", lambda bench: [tmp_path / "numerics" / "1xH100.json"])
    monkeypatch.setattr(tables, "read", lambda path: run)
    text = tables.numerics_table()
    assert "tilestack passes: its largest distance is 1.50 times the envelope, at most 2" in text
    assert "0% of its steps lie inside" in text and "| 1 | 0.01000 | 0.01000 | 0.01500 | 1.50 |" in text
