"""Every way of keeping the optimizer's state, in one process and under DeepSpeed on two (gloo, CPU)."""

import json
from pathlib import Path

import pytest
import torch

from distributed import states_worker as worker
from distributed.launching import TORCHRUN, launch, once, shared_folder
from distributed.tiny import global_step, tiny_config, tiny_model
from tilestack.distributed import DistributedConfig, OptimizerConfig, SettingsError, make_engine
from tilestack.distributed.deepspeed_engine import _units, parameter_groups
from tilestack.distributed.memory_model import Sizes, Training, memory
from tilestack.kernels.adamw.eight_bits import scales_of

SETTINGS = (
    "2",
    "0-8bit",
    "1-bfloat16",
    "2-bfloat16-bare-once",
    "2-experts-8bit-bare",
    "3-8bit-bare",
    "1-offload",
    "2-experts-offload",
    "3-offload-once",
)
LOCAL = {
    "bfloat16": {"moments": "bfloat16"},
    "8bit": {"moments": "8bit"},
    "8bit-bare": {"moments": "8bit", "master_weights": False},
}


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """One launch for all settings."""
    folder = shared_folder(tmp_path_factory, "states")
    once(folder, "states", lambda folder: launch(*TORCHRUN, 2, worker.__file__, folder, *SETTINGS))
    return folder


@pytest.fixture(params=SETTINGS)
def run(request, folder) -> dict:
    ranks = [json.loads((folder / f"{rank}.json").read_text())[request.param] for rank in (0, 1)]
    return ranks[0] | {"setting": request.param, "ranks": ranks}


def local(**options):
    optimizer = OptimizerConfig(lr=1e-2, max_grad_norm=0.5, **options)
    return make_engine(tiny_model(torch.bfloat16), optimizer, DistributedConfig(engine="local"), 4)


def losses(engine, first: int, last: int) -> list[float]:
    return [engine.train_step(global_step(step, 4), lr=1e-2).loss.item() for step in range(first, last)]


def test_the_losses_are_those_of_float32_moments_and_master_weights(run, folder):
    plain = json.loads((folder / "0.json").read_text())["2"]["losses"]
    if "once" in run["setting"]:  # other micro-batches
        once = make_engine(tiny_model(torch.bfloat16), OptimizerConfig(lr=1e-2, max_grad_norm=0.5),
                           DistributedConfig(engine="local"), 2)  # fmt: skip
        plain = [once.train_step(global_step(step, 2), lr=1e-2).loss.item() for step in range(worker.STEPS)]
    assert run["losses"] == pytest.approx(plain, rel=2e-3)
    assert max(run["losses"]) - min(run["losses"]) > 0.01, "hardly trained, so the test says nothing"


def test_a_resumed_run_repeats_the_uninterrupted_one_bit_for_bit(run):
    for found in run["ranks"]:
        assert found["resumed"] == found["losses"][3:]
        assert found["same weights"]
        assert found["dtypes"] == ["torch.bfloat16"]


def test_the_state_takes_the_bytes_that_were_chosen(run):
    held, words = run["bytes"], run["setting"].split("-")
    weights = held["updated"] // (2 if "bare" in words else 4)
    assert held["moments"] == 2 * weights * (2 if "bfloat16" in words else 1 if "8bit" in words else 4)
    assert (held["scales"] > 0) == ("8bit" in words)


def planned(run: dict) -> Training:
    distributed, optimizer = worker.chosen(run["setting"], ranks=2)
    return Training(
        gpus=2, accumulation=worker.micro_batches(run["setting"]), zero=distributed.zero,
        expert_parallel=distributed.expert_parallel, moments=optimizer.moments,
        master_weights=optimizer.master_weights, offload=optimizer.offload, micro_batch_tokens=64,
    )  # fmt: skip


TINY = {"rel": 0.02}  # what ranks and groups are filled up with; of a real model it is nothing


def test_the_plan_knows_the_bytes_of_weights_masters_moments_and_gradients(run):
    parts, held = memory(tiny_config(), planned(run)).moments["update"], run["bytes"]
    assert held["model"] == pytest.approx(parts["weights"], **TINY)
    if planned(run).offload:
        assert {"master weights", "moments"}.isdisjoint(parts)
        return
    assert ("master weights" in parts) == planned(run).master_weights
    assert held["updated"] == pytest.approx(parts.get("master weights", held["updated"]), **TINY)
    assert held["moments"] + held["scales"] == pytest.approx(parts["moments"], **TINY)
    if "gradients" in held:
        assert held["gradients"] == pytest.approx(parts["gradients"], **TINY)


def test_the_plan_knows_the_buckets_and_which_gradients_fill_them_or_travel(run):
    training = planned(run)
    sizes, moments = Sizes(tiny_config(), training), memory(tiny_config(), training).moments
    norms = sum(each.numel() for each in tiny_model().parameters() if each.dim() == 1)
    for found in (each["on their way"] for each in run["ranks"]):
        assert found["buckets"] == moments["backward, first layer"].get("buckets", 0)
        if sizes.one_pass:
            layers = range(tiny_config().num_hidden_layers, 0, -1)
            expected = [sizes.in_flight(layer) for layer in layers] * training.accumulation
            assert found["in flight"] == pytest.approx(expected, rel=0, abs=2 * norms)
        elif training.zero == 2:
            filled = [filled for filled, _ in sizes.sent_together()] * training.accumulation
            assert found["filled"] == pytest.approx(filled, abs=norms)
            assert max(found["reduced"]) <= sizes.on_the_way()
        elif training.zero < 2:
            assert max(found["filled"]) == pytest.approx(sizes.reduced_together(), **TINY)


def test_zero_2_reduces_a_layers_matrices_together_and_weights_of_experts_or_outside_of_layers_each_by_itself():
    model = tiny_model()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    matrices, vectors = (list(_units(model, group)) for group in parameter_groups(model, 0.1))
    together = {tuple(names[id(each)] for each in group["params"]) for group in matrices}
    layer = "model.layers.1"
    attention = [f"{layer}.self_attn.{each}_proj.weight" for each in "qkvo"]
    assert (*attention, f"{layer}.mlp.gate.weight") in together
    alone = ("lm_head.weight", "model.embed_tokens.weight", f"{layer}.mlp.experts.down_proj")
    assert {(name,) for name in alone} < together and len(together) == 2 + 2 * 3
    assert [len(group["params"]) for group in vectors] == [sum(each.dim() == 1 for each in model.parameters())]


def test_the_plan_knows_which_gradients_are_copied_for_the_update(run):
    training = planned(run)
    if training.offload or training.zero < 2:
        return
    expected = memory(tiny_config(), training).moments["update"].get("copies for the update", 0)
    for found in (each["on their way"] for each in run["ranks"]):
        assert max(found["updated"], default=0) == pytest.approx(expected, **TINY)


def test_a_single_process_takes_up_what_two_saved_with_8_bits_and_no_masters(folder):
    expected = json.loads((folder / "0.json").read_text())["2"]["losses"]
    for setting in ("2-experts-8bit-bare", "3-8bit-bare"):
        engine = local(**LOCAL["8bit-bare"])
        engine.load(folder / setting)
        assert losses(engine, 3, worker.STEPS) == pytest.approx(expected[3:], rel=2e-3)


@pytest.mark.parametrize("kept", LOCAL)
def test_one_process_trains_and_resumes_with_it_bit_for_bit(kept, tmp_path):
    engine = local(**LOCAL[kept])
    expected = losses(local(), 0, 5)
    found = losses(engine, 0, 3)
    engine.save(tmp_path)
    found += losses(engine, 3, 5)
    assert found == pytest.approx(expected, rel=2e-3)
    resumed = local(**LOCAL[kept])
    resumed.load(tmp_path)
    assert losses(resumed, 3, 5) == found[3:]
    for name, slot in resumed.slots.items():
        assert torch.equal(slot.parameter, engine.slots[name].parameter)
        for kind, each in slot.moments.items():
            assert torch.equal(each, engine.slots[name].moments[kind]), kind


def test_8_bit_moments_take_two_bytes_a_parameter_and_their_scales():
    engine = local(moments="8bit", master_weights=False)
    for slot in engine.slots.values():
        n = slot.parameter.numel()
        assert sum(each.nbytes for each in slot.moments.values()) == 2 * n + 2 * 4 * scales_of(n)
        assert slot.master is None


@pytest.mark.parametrize("kept", LOCAL)
def test_what_a_copy_to_save_takes_is_known_without_decoding_anything(kept, monkeypatch):
    saving = local(**LOCAL[kept]).saving()
    taken = sum(each.nbytes for piece in saving.copied().pieces() for each in piece.tensors.values())
    monkeypatch.setattr("tilestack.distributed.optimizer.decode", None)
    assert saving.nbytes == taken


@pytest.mark.parametrize(
    ("distributed", "optimizer", "alone", "message"),
    [
        ({"zero": 2}, {"offload": True}, True, "optimizer.offload is DeepSpeed's, and this is one process without it"),
        ({"zero": 0}, {"offload": True}, False, "optimizer.offload works with distributed.zero 1, 2 or 3, got 0"),
        ({"zero": 1}, {"master_weights": False}, False, "works with distributed.zero 2 or 3, or in one process"),
    ],
)
def test_what_cannot_go_together_is_refused_in_one_sentence(distributed, optimizer, alone, message):
    with pytest.raises(SettingsError, match=message):
        DistributedConfig(**distributed).check_optimizer(OptimizerConfig(**optimizer), "bfloat16", not alone)


def test_float32_weights_are_their_own_masters_at_every_stage():
    for zero in range(4):
        settings = DistributedConfig(zero=zero), OptimizerConfig(master_weights=False)
        settings[0].check_optimizer(settings[1], "float32", with_deepspeed=True)


@pytest.mark.parametrize("change", [{"moments": "8bit"}, {"master_weights": False}])
def test_offload_refuses_what_it_does_not_do(change):
    with pytest.raises(ValueError, match="optimizer.offload updates float32 moments and master weights on the host"):
        OptimizerConfig(offload=True, **change)


def test_moments_of_another_name_are_refused():
    with pytest.raises(ValueError, match="optimizer.moments must be 'float32', 'bfloat16' or '8bit', got 'fp8'"):
        OptimizerConfig(moments="fp8")
