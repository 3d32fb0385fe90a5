"""A few of the random calls of tilestack/testing/random_attention.py; the program itself runs a thousand on a GPU."""

import json

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tilestack.testing import random_attention
from tilestack.testing.compare import errors

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


class OneDevice(TorchDispatchMode):
    """Fails an operator whose tensors are on several devices, which a GPU may refuse."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert len({each.device for each in args if isinstance(each, torch.Tensor)}) <= 1, func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("shape", [(2, 0, 4), (2, 3, 4)])
def test_errors_of_a_tensor_and_of_an_empty_one_are_scaled_on_the_device_they_are_on(shape):
    eager, exact = (torch.empty(shape, device="meta", dtype=dtype) for dtype in (torch.bfloat16, torch.float64))
    with OneDevice():
        scaled = random_attention._scaled(eager, eager, exact)
    assert [(each.shape, each.dtype) for each in scaled] == [(shape, each.dtype) for each in (eager, eager, exact)]


@pytest.mark.parametrize("seed", [0, 7])
def test_a_seed_makes_the_same_call_each_time(seed):
    (first, dtype), (second, _) = (random_attention.make(seed, 24) for _ in range(2))
    assert first.arguments == second.arguments
    made = [each.make(dtype, torch.device("cpu"), torch.Generator().manual_seed(seed)) for each in (first, second)]
    for name, tensor in made[0].items():
        assert tensor is None or torch.equal(tensor, made[1][name])


def test_the_parts_share_the_seeds_and_a_run_that_is_stopped_says_what_it_did_not_reach(monkeypatch, tmp_path):
    seen, record = [], tmp_path / "random.json"

    def collect(seeds, *_):
        mine = list(seeds)
        if 270 in mine:
            raise KeyboardInterrupt
        seen.extend(mine)
        return random_attention.Report(random_attention.Counter(ours=len(mine)))

    monkeypatch.setattr(random_attention, "collect", collect)
    with pytest.raises(KeyboardInterrupt):
        random_attention.main(["--first", "100", "--cases", "200", "--record", str(record)])
    found = json.loads(record.read_text())
    assert 0 < found["calls"]["ours"] == len(seen) and found["not_reached"] == 200 - len(seen)
    assert all(
        len({seed % random_attention.N_VARIANTS for seed in each}) == 1
        for each in random_attention.parts(range(7, 500))
    )
    monkeypatch.setattr(random_attention, "collect", lambda seeds, *_: seen.extend(seeds) or random_attention.Report())
    seen.clear()
    random_attention.main(["--first", "100", "--cases", "200"])
    assert sorted(seen) == list(range(100, 300))


def test_calls_that_a_time_limit_leaves_out_are_counted_in_the_record(tmp_path):
    record = tmp_path / "random.json"
    assert random_attention.main(["--cases", "5", "--seconds", "0", "--record", str(record)]) == 0
    found = json.loads(record.read_text())
    assert found["not_reached"] == 5 and not found["calls"]


def test_errors_that_are_added_up_are_judged_as_those_of_one_tensor():
    generator = torch.Generator().manual_seed(0)
    exact = torch.randn(2, 50, generator=generator, dtype=torch.float64)
    ours, eager = (exact + 1e-3 * scale * torch.randn(2, 50, generator=generator) for scale in (1.0, 0.8))
    whole = errors("whole", ours, eager, exact)
    parts = [errors("part", *each) for each in zip(ours, eager, exact, strict=True)]
    added = parts[0] + parts[1]
    assert (added.numbers, added.count, added.largest) == (100, 100, whole.largest)
    assert added.squares == pytest.approx(whole.squares)
    with pytest.raises(AssertionError, match="root mean square|largest"):
        (added + errors("off", exact[0] * 1.1, exact[0], exact[0])).judge("all", torch.float64)
