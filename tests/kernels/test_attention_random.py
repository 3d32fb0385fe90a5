"""A few of the random calls of tilestack/testing/random_attention.py; the program itself runs a thousand on a GPU."""

import pytest
import torch

from tilestack.testing import random_attention

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SEEDS, LONGEST = (range(96), 600) if DEVICE.type == "cuda" else ((9, 25, 27, 33), 24)


def test_random_calls_are_within_twice_the_error_of_eager():
    report = random_attention.run(SEEDS, DEVICE, LONGEST)
    assert not report.failures, "\n".join(report.failures)
    assert report.calls["tilestack-triton"] == len(SEEDS)


def test_a_wrong_implementation_is_found_and_its_seed_named(monkeypatch):
    evaluate = random_attention.evaluate

    def off_by_a_little(op, case, tensors, implementation):
        found = evaluate(op, case, tensors, "reference")
        if implementation == "tilestack-triton":
            found["out"] = found["out"] * 1.02
        return found

    monkeypatch.setattr(random_attention, "evaluate", off_by_a_little)
    report = random_attention.run([5], torch.device("cpu"), 24, ("tilestack-triton",))
    assert report.failures and "seed 5" in report.failures[0] and "out" in report.failures[0]


@pytest.mark.parametrize("seed", [0, 7])
def test_a_seed_makes_the_same_call_each_time(seed):
    (first, dtype), (second, _) = (random_attention.make(seed, 24) for _ in range(2))
    assert first.arguments == second.arguments
    made = [each.make(dtype, torch.device("cpu"), torch.Generator().manual_seed(seed)) for each in (first, second)]
    for name, tensor in made[0].items():
        assert tensor is None or torch.equal(tensor, made[1][name])
