"""Every split over four (and three) processes has the losses and gradients of one process."""

import itertools

import pytest
import torch

from distributed import splits_worker
from distributed.launching import TORCHRUN, launch
from tilestack.distributed import DistributedConfig

# ZeRO stage, ranks that share the experts, ranks that share the rows: experts are split with stages 1 and 2 alone
ALL = [
    (zero, experts, rows)
    for zero, experts, rows in itertools.product((0, 1, 2, 3), (1, 2, 4), (1, 2, 4))
    if experts == 1 or zero in (1, 2)
]
# every stage, number of ranks that share experts, and number that share rows; two processes have more
QUICK = [(3, 1, 1), (1, 4, 1), (0, 1, 2), (2, 2, 2), (2, 4, 4), (3, 1, 4)]
REST = [each for each in ALL if each not in QUICK]
OF_THREE = [(2, 1, 1), (3, 1, 1)]


def check(found: dict, alone: dict) -> None:
    """float32 sums in another order: the loss to the last places, each weight's gradient to 1e-5 of its norm."""
    assert found["loss"] == pytest.approx(alone["loss"], rel=2**-22)
    assert found["norm"] == pytest.approx(alone["norm"], rel=1e-5)
    for name, gradient in alone["gradient"].items():
        assert (found["gradient"][name] - gradient).norm() <= 1e-5 * gradient.norm(), name
    assert found["second loss"] == pytest.approx(alone["second loss"], rel=1e-5)


def run(folder, processes: int, splits: list[tuple[int, int, int]]) -> dict[str, dict]:
    names = ["-".join(map(str, split)) for split in splits]
    launch(*TORCHRUN, processes, splits_worker.__file__, folder / "found.pt", *names)
    return torch.load(folder / "found.pt")


@pytest.mark.parametrize(
    ("processes", "splits"),
    [
        (4, QUICK),
        pytest.param(4, REST, marks=pytest.mark.slow),
        pytest.param(3, OF_THREE, marks=pytest.mark.slow),
    ],
    ids=["4 processes", "4 processes, all other splits", "3 processes"],
)
def test_every_split_has_the_loss_and_the_gradients_of_one_process(processes, splits, tmp_path):
    alone = splits_worker.two_steps(DistributedConfig(engine="local"), processes)
    found = run(tmp_path, processes, splits)
    assert len(found) == len(splits)
    for split, result in found.items():
        try:
            check(result, alone)
        except AssertionError as error:
            error.add_note(f"ZeRO stage, ranks that share experts, ranks that share rows: {split}")
            raise
