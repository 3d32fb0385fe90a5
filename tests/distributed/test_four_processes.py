"""Four real processes (gloo, CPU): a model that no rank loads whole, and checkpoints that change hands."""

import pytest
import torch

from distributed import four_worker, worker
from distributed.launching import TORCHRUN, launch, once, one_process, results
from distributed.tiny import tiny_config
from tilestack.bench.equality import exported, same_bits
from tilestack.models import drawn, materialise
from tilestack.models.weights import outline

RANKS = 4
LARGE = {"hidden_size": 128, "moe_intermediate_size": 128, "num_experts": 64, "num_hidden_layers": 4}


def launch_four(folder):
    model, weights = drawn(tiny_config(**LARGE), torch.float32, seed=0)
    materialise(model, weights, torch.device("cpu"))
    model.save_pretrained(folder / "large")
    launch(*TORCHRUN, RANKS, four_worker.__file__, folder)


@pytest.fixture(scope="module")
def four(folder):
    """What the four processes found, and how many elements each parameter of the larger model has."""
    once(folder, "four", launch_four)
    sizes = {name: each.numel() for name, each in outline(tiny_config(**LARGE), torch.float32).named_parameters()}
    return results(folder, "four", RANKS), sizes


def test_a_rank_reads_a_quarter_under_zero_3_and_its_own_experts_where_they_are_split(four):
    ranks, sizes = four
    experts = sum(size for name, size in sizes.items() if "experts" in name)
    rest = sum(sizes.values()) - experts
    asked = {setting: [rank["parts"][setting]["elements"] for rank in ranks] for setting in four_worker.PARTS}
    assert sum(asked["3"]) == experts + rest
    assert max(asked["3"]) <= (experts + rest) / RANKS + len(sizes)
    assert asked["2-experts-4"] == [experts // RANKS + rest] * RANKS


def test_no_rank_ever_has_the_whole_model_in_its_memory(four):
    ranks, sizes = four
    whole = 4 * sum(sizes.values())
    for setting in four_worker.PARTS:
        for rank in ranks:  # a quarter, a sixth (the largest weight) while it is cut, and what a process varies by
            assert rank["parts"][setting]["peak"] < whole / 2, setting


def test_four_processes_take_up_what_two_saved_bit_for_bit(four, folder):
    for saved in four_worker.FROM_TWO:
        assert same_bits(folder / f"checkpoint-{saved} on four", folder / f"checkpoint-{saved}"), saved


@pytest.mark.parametrize("setting", four_worker.PARTS)
def test_one_process_takes_up_what_four_saved_bit_for_bit(setting, four, folder, tmp_path):
    engine, _ = one_process(steps=0)
    engine.load(folder / f"checkpoint-{setting} of four")
    engine.save(tmp_path)
    assert same_bits(tmp_path, folder / f"checkpoint-{setting} of four")


@pytest.mark.parametrize("setting", four_worker.PARTS)
def test_four_processes_take_the_steps_of_one_and_export_what_they_trained(setting, four, folder):
    ranks, _ = four
    _, expected = one_process(steps=3)
    for rank in ranks:
        assert worker.losses(rank["steps"][setting]) == pytest.approx(worker.losses(expected), rel=1e-5)
    export, saved = (folder / f"{each}-{setting} of four" for each in ("export", "checkpoint"))
    assert exported(export, saved, folder / "model", torch.float32)


def test_if_one_rank_cannot_read_its_part_every_rank_says_so_and_none_waits(four, folder):
    ranks, _ = four
    said = [rank["unreadable"] for rank in ranks]
    assert said[2].endswith("pieces-00001-0000.safetensors is damaged")
    for other in (0, 1, 3):
        assert said[other] == f"{folder / 'checkpoint-2'} could not be read by 1 other of 4 processes"
