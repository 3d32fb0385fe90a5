"""`tilestack plan`: what it predicts, what it proposes, and what it refuses."""

import dataclasses
import json

import pytest
import torch

from tilestack.app.cli import main
from tilestack.app.config import Config, check
from tilestack.app.errors import UserError
from tilestack.app.parse import from_tree, to_plain
from tilestack.app.plan.models import planned_model
from tilestack.app.plan.proposals import STATES, plan, proposals, training_of
from tilestack.distributed import DistributedConfig, OptimizerConfig, SettingsError, make_engine
from tilestack.distributed.memory_model import GIB, Training, memory

H100, H200 = 79.2 * GIB, 139.8 * GIB


@pytest.fixture(scope="module")
def qwen():
    return planned_model("Qwen3-30B-A3B", None, Config())[1]


def said(capsys, words: str) -> str:
    main(["plan", *words.split()])
    return capsys.readouterr().out


def test_known_models_have_the_parameters_that_their_names_say(qwen):
    with torch.device("meta"):
        from transformers import Qwen3MoeForCausalLM

        real = sum(each.numel() for each in Qwen3MoeForCausalLM(qwen).parameters())
    assert real == pytest.approx(30.53e9, rel=1e-3)
    assert memory(qwen, Training()).parts["weights"] == 2 * real
    large = planned_model("Qwen/Qwen3-235B-A22B", None, Config())[1]
    assert memory(large, Training()).parts["weights"] / 2 == pytest.approx(235.1e9, rel=1e-3)


@pytest.mark.parametrize("kept", [{}, {"moments": "bfloat16"}, {"moments": "8bit", "master_weights": False}])
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_parts_of_one_process_are_those_of_its_engine(kept, accumulation, dtype):
    from distributed.tiny import tiny_config, tiny_model

    engine = make_engine(
        tiny_model(getattr(torch, dtype)), OptimizerConfig(**kept), DistributedConfig(engine="local"), accumulation
    )
    planned = Training(deepspeed=False, zero=0, accumulation=accumulation, dtype=dtype, micro_batch_tokens=8, **kept)
    parts = memory(tiny_config(), planned).moments["update"]
    slots = engine.slots.values()
    assert parts["weights"] == sum(slot.parameter.nbytes for slot in slots)
    assert parts.get("master weights", 0) == sum(slot.master.nbytes for slot in slots if slot.master is not None)
    moments = sum(each.nbytes for slot in slots for each in slot.moments.values())
    assert parts["moments"] == pytest.approx(moments, rel=0.01)  # a tensor's last scale is of fewer than 256
    sums = [slot.grad if slot.grad is not None else slot.parameter for slot in slots]
    assert parts["gradients"] == sum(each.nbytes for each in sums)


def test_the_full_model_fits_on_four_h200_and_with_narrow_state_or_offload_on_four_h100(qwen):
    four = Training(gpus=4, expert_parallel=4, checkpointing="full")
    room = {
        "H200": plan(qwen, four, H200).room,
        "H100, 8 bits": plan(qwen, dataclasses.replace(four, moments="8bit", master_weights=False), H100).room,
        "H100, offload": plan(qwen, dataclasses.replace(four, offload=True), H100).room,
        "H100": plan(qwen, four, H100).room,
    }
    assert room.pop("H100") < 0
    assert all(each > 3 * GIB for each in room.values()), room


@pytest.mark.parametrize(("gpus", "gpu_bytes"), [(4, H100), (4, H200), (8, H100)])
def test_proposals_fit_are_ordered_by_speed_and_are_configurations_that_train(qwen, gpus, gpu_bytes):
    found = proposals(qwen, gpus, gpu_bytes, seqlen=4096)
    assert found and all(each.room >= 0 for each in found)
    rates = [each.tokens_per_second for each in found]
    assert rates == sorted(rates, reverse=True)
    for each in found:
        tree = to_plain(Config())
        tree["model"]["max_positions"] = 4096
        for name, value in each.options.items():
            group, key = name.split(".")
            tree[group][key] = value
        config = from_tree(tree)
        check(config, gpus)
        planned = training_of(config, gpus)
        assert dataclasses.replace(planned, update_bytes=each.training.update_bytes) == each.training


def test_a_less_precise_state_is_proposed_only_where_it_is_faster(qwen):
    found = proposals(qwen, 64, H200, seqlen=4096)
    assert {each.training.moments for each in found} == {"float32"}
    precise = [STATES.index((t.moments, t.master_weights, t.offload)) for t in (each.training for each in found)]
    assert precise == sorted(precise, reverse=True)


def test_more_of_everything_needs_more_memory(qwen):
    base = Training(gpus=4, expert_parallel=4, checkpointing="full", moments="8bit")
    more = [
        {"micro_batch_tokens": 8192}, {"checkpointing": "selective"}, {"moments": "bfloat16"}, {"accumulation": 2},
        {"expert_parallel": 2}, {"zero": 1},
    ]  # fmt: skip
    for change in more:
        assert memory(qwen, dataclasses.replace(base, **change)).total > memory(qwen, base).total, change


def test_a_configuration_is_planned_part_by_part(capsys):
    words = "--model Qwen3-30B-A3B --gpus 4 --gpu H200 --model.dtype bfloat16 --data.sequence_length 512 "
    text = said(capsys, words + "--train.micro_batches 4 --distributed.expert_parallel 4 --optimizer.moments 8bit")
    for line in (
        "weights",
        "master weights",
        "moments",
        "gradients on their way",
        "activations",
        "It fits",
        "TFLOP/s a GPU",
    ):
        assert line in text
    code = main(["plan", *words.replace("H200", "40GB").split(), "--train.micro_batches", "4"])
    assert code == 1 and "does not fit" in capsys.readouterr().out


@pytest.mark.parametrize(("device", "offload"), [("cpu", True), ("none", False)])
def test_a_deepspeed_file_that_offloads_is_planned_so(device, offload, tmp_path):
    path = tmp_path / "own.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": device}}}))
    tree = to_plain(Config())
    tree["distributed"]["deepspeed_config"] = str(path)
    planned = training_of(from_tree(tree), 2)
    assert (planned.zero, planned.offload) == (3, offload)


def test_json_has_every_figure(capsys):
    found = json.loads(said(capsys, "--model Qwen3-30B-A3B --layers 12 --gpus 2 --gpu H100 --json"))
    assert found["model"] == "Qwen3-30B-A3B, 12 layers"
    for each in found["configurations"]:
        assert each["fits"] and each["total_bytes"] <= found["gpu_bytes"]
        assert max(sum(parts.values()) for parts in each["moments"].values()) == pytest.approx(each["allocated_bytes"])
        assert sum(time for part, time in each["step_ms"].items() if part != "total") == pytest.approx(
            each["step_ms"]["total"], rel=1e-2
        )


def test_without_weights_or_options_the_model_of_the_preset_is_planned(capsys):
    assert "the configuration's new model on 1 x H100" in said(capsys, "--gpu H100")


def test_nothing_that_fits_is_said_so(capsys):
    assert "No configuration fits" in said(capsys, "--model Qwen3-235B-A22B --gpus 1 --gpu 16GB")


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        ("--gpus 0", UserError, "--gpus must be a whole number from 1 on, got '0'"),
        ("--gpu Z80", UserError, "--gpu must be H100, H200, A100, or memory as 80GB, 79.2GiB or in bytes, got 'Z80'"),
        ("--model Qwen3-30B-A3", UserError, "did you mean Qwen3-30B-A3B?"),
        ("--distributed.zeros 2", UserError, "did you mean --distributed.zero?"),
        (
            "--gpus 4 --train.micro_batches 4 --distributed.expert_parallel 3",
            SettingsError,
            "must divide the number of processes, 4",
        ),
        ("--gpus 32 --train.micro_batches 32 --distributed.expert_parallel 32", SettingsError, "divide the model's"),
        ("--gpus 4 --distributed.zero 0 --train.micro_batches 4 --optimizer.offload true", SettingsError, "1, 2 or 3"),
        (
            "--gpus 2 --distributed.zero 3 --distributed.expert_parallel 2 --train.micro_batches 2",
            SettingsError,
            "works with ZeRO 1 or 2, got distributed.zero = 3",
        ),
    ],
)
def test_wrong_input_gets_one_clear_error(words, error, message, capsys):
    from tilestack.app.plan.command import main as command

    with pytest.raises(error, match=message.replace("?", r"\?").replace("(", r"\(")):
        command(words.split())


def test_help_names_every_option(capsys):
    text = said(capsys, "--help")
    for option in ("--model", "--layers", "--gpus", "--gpu", "--seqlen", "--step-tokens", "--json"):
        assert f"  {option}" in text
