"""DeepSpeed on two real processes (gloo, CPU) and on one, against the engine of one process."""

import pytest
import torch
from safetensors import safe_open
from transformers import Qwen3MoeForCausalLM

from distributed import worker
from distributed.launching import ALONE, ROWS, SETTINGS, one_process, results
from distributed.tiny import global_step, micro_batch, tiny_model
from tilestack.distributed import DistributedConfig, make_engine


@pytest.fixture(params=[(2, each) for each in SETTINGS] + [(1, ALONE)], ids=lambda p: f"{p[0]} processes, ZeRO {p[1]}")
def run(request, folder) -> dict:
    """What rank 0 found under one setting; `rank 1` too where there is one."""
    processes, setting = request.param
    folder = folder if processes == 2 else folder / "alone"
    found = results(folder, setting, processes)
    return found[0] | {"setting": setting, "folder": folder, "processes": processes, "ranks": found}


def test_every_step_is_that_of_one_process_that_accumulates_the_same_micro_batches(run):
    # float32 sums in another order: equal to the last place in the first step, and training amplifies that a little
    _, expected = one_process()
    assert run["steps"][0]["loss"] == pytest.approx(expected[0]["loss"], rel=2**-23)
    for found, step in zip(run["steps"], expected, strict=True):
        assert found["loss"] == pytest.approx(step["loss"], rel=1e-5)
        assert found["aux_loss"] == pytest.approx(step["aux_loss"], rel=1e-5)
        assert found["grad_norm"] == pytest.approx(step["grad_norm"], rel=1e-4)
        assert found["expert_load"] == pytest.approx(step["expert_load"], abs=0.01)  # a near tie may route otherwise


def test_every_rank_reports_the_same_numbers(run):
    for found in run["ranks"]:
        assert found["steps"] == run["steps"]
        assert found["evaluation"] == run["evaluation"]


def test_gradients_of_the_experts_go_through_autograd_whose_hooks_deepspeed_reduces_on(run):
    assert run["summed in kernels"] == []
    alone = make_engine(tiny_model(torch.bfloat16), worker.OPTIMIZER, DistributedConfig(engine="local"), 2)
    assert any(hasattr(parameter, "gradient_sum") for parameter in alone.model.parameters())


def test_a_resumed_run_repeats_the_uninterrupted_one_bit_for_bit(run):
    assert run["resumed"] == run["steps"][3:]


def test_evaluation_is_the_mean_over_the_labels_of_all_ranks(run):
    engine, _ = one_process()
    batches = [micro_batch(seed + rank) for rank in range(run["processes"]) for seed in (7, 17)]
    assert run["evaluation"] == pytest.approx(engine.evaluate(batches), rel=1e-5)


def test_evaluation_refuses_another_number_of_batches_on_another_rank(run):
    expected = "ValueError: evaluate needs as many batches on every rank, got between 1 and 2"
    for found in run["ranks"]:
        assert found["uneven evaluation"] == (expected if run["processes"] == 2 else "no error")


def test_the_export_loads_in_plain_transformers_and_holds_the_trained_weights(run):
    trained = torch.load(run["folder"] / f"weights-{run['setting']}.pt")
    exported, report = Qwen3MoeForCausalLM.from_pretrained(
        run["folder"] / f"export-{run['setting']}", output_loading_info=True
    )
    with safe_open(run["folder"] / f"export-{run['setting']}" / "model.safetensors", "pt") as file:
        assert "model.layers.0.mlp.experts.7.down_proj.weight" in file.keys()  # noqa: SIM118  (not a dict)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    assert len(trained) == len(list(exported.parameters()))
    for name, parameter in exported.named_parameters():
        assert torch.equal(parameter, trained[name]), name
    engine, _ = one_process()
    learned = engine.model.lm_head.weight - tiny_model().lm_head.weight
    assert (trained["lm_head.weight"] - engine.model.lm_head.weight).norm() < 1e-3 * learned.norm()


def test_a_step_that_is_not_finite_changes_no_weight(run):
    for key in ("not finite", "bfloat16 not finite"):
        for found in run["ranks"]:
            assert not found[key]["norm is finite"], key
            assert found[key]["weights are the same"], key
            assert 0 < found[key]["next norm"] < 100, key


def test_bfloat16_trains_as_one_process_does(run):
    # gradients are rounded to bfloat16 (8 bits) at other places; a wrong scale would show at once at this learning rate
    _, expected = one_process(torch.bfloat16, steps=3)
    assert run["bfloat16"] == pytest.approx(worker.losses(expected), rel=2**-9)


def test_rotary_frequencies_stay_float32_with_bfloat16_weights(run):
    dtype, *frequencies = run["inv_freq"]
    assert dtype == "torch.float32"
    assert frequencies == tiny_model().model.rotary_emb.inv_freq.tolist()


def test_activation_checkpointing_changes_nothing(run):
    plain = worker.losses(run["steps"][:2])
    assert run["checkpointed"] == {"full": plain, "selective": plain}


def test_all_that_recomputed_layers_send_to_other_ranks_is_waited_for(run):
    # recomputing ends when the backward has what it needs: the first part's way home began and nobody reads it
    for found in run["ranks"]:
        assert found["unawaited"] == 0


def test_sizes_are_read_once_a_layer_and_micro_batch_and_again_where_a_layer_is_made_again(run):
    once = 2 * worker.MICRO_BATCHES / run["processes"] if "experts" in run["setting"] else 0  # of two layers
    for found in run["ranks"]:
        assert found["waits"] == {"none": once, "full": 2 * once, "selective": 2 * once}


def test_a_deepspeed_file_of_ones_own_with_deepspeeds_optimizer_trains_alike(run):
    assert run["own file"] == pytest.approx(worker.losses(run["steps"][:2]), rel=1e-6)


def test_a_checkpoint_resumes_under_another_split(folder):
    # the same weights and moments to the bit, then float32 sums in another order
    _, expected = one_process()
    found, other_rank = results(folder, "reshaped", 2)
    assert found == other_rank
    assert len(found) == len(SETTINGS) + 2
    for way, steps in found.items():
        for step, after in zip(steps, expected[3:], strict=True):
            assert step["loss"] == pytest.approx(after["loss"], rel=1e-5), way
            assert step["grad_norm"] == pytest.approx(after["grad_norm"], rel=1e-4), way


def test_a_single_process_takes_up_what_two_saved(folder):
    _, expected = one_process()
    for setting in (*SETTINGS, *ROWS):
        engine, _ = one_process(steps=0)
        engine.load(folder / f"checkpoint-{setting}")
        found = [engine.train_step(global_step(s, worker.MICRO_BATCHES), lr=1e-2) for s in (3, 4)]
        assert worker.losses(map(worker.measured, found)) == pytest.approx(worker.losses(expected[3:]), rel=1e-5)


def test_each_rank_writes_its_own_part_and_no_pickle(run):
    writers = 1 if run["setting"] == "0" else run["processes"]
    assert run["files"] == ["engine.json", *(f"pieces-{rank:05d}-0000.safetensors" for rank in range(writers))]


def test_moe_blocks_and_attention_are_leaves_under_zero_3(run):
    expected = [f"model.layers.{layer}.{module}" for layer in range(2) for module in ("mlp", "self_attn")]
    assert run["leaves"] == (sorted(expected) if run["setting"] == "3" else [])


@pytest.mark.parametrize("setting", ROWS)
def test_ranks_that_share_every_row_take_the_steps_of_one_process(setting, folder):
    # rows of odd lengths too, which the ranks do not divide, with documents that reach over the cut
    found, other_rank = results(folder, setting, 2)
    assert found == other_rank
    engine, expected = one_process()
    for step, after in zip(found["steps"], expected, strict=True):
        for key in ("loss", "aux_loss"):
            assert step[key] == pytest.approx(after[key], rel=1e-5), key
        assert step["grad_norm"] == pytest.approx(after["grad_norm"], rel=1e-4)
    for step, after in zip(found["from alone"], expected[3:], strict=True):
        assert step["loss"] == pytest.approx(after["loss"], rel=1e-5)
    _, expected = one_process(torch.bfloat16, steps=3)
    for step, after in zip(found["bfloat16"], expected, strict=True):
        assert step["loss"] == pytest.approx(after["loss"], rel=2**-9)
        assert step["grad_norm"] == pytest.approx(after["grad_norm"], rel=2**-6)
    batches = [micro_batch(7), micro_batch(17, lengths=(20, 29))]
    assert found["evaluation"] == pytest.approx(engine.evaluate(batches), rel=1e-5)
