"""The engine of one process against plain transformers and torch's AdamW."""

import json

import pytest
import torch
from host_reads import NoHostReads
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import Qwen3MoeForCausalLM

from distributed.tiny import global_step, plain_model, tiny_model
from tilestack.distributed import CheckpointError, DistributedConfig, OptimizerConfig, local, make_engine

OPTIMIZER = OptimizerConfig(lr=1e-2, max_grad_norm=0.5)
ACCUMULATION = 3


def local_engine(model, optimizer=OPTIMIZER, accumulation=ACCUMULATION, **options):
    return make_engine(model, optimizer, DistributedConfig(engine="local"), accumulation, **options)


def losses(engine, steps, first=0) -> list[float]:
    return [engine.train_step(global_step(step, ACCUMULATION), lr=1e-2).loss.item() for step in range(first, steps)]


def state_of(engine) -> dict[tuple[str, str], torch.Tensor]:
    return {(piece.name, kind): t.clone() for piece in engine._pieces() for kind, t in piece.tensors.items()}


def plain_inputs(batch: dict) -> dict:
    return {name: batch[name] for name in ("input_ids", "labels", "position_ids")}


def plain_training(model, steps):
    """The same training by hand: transformers' forward, autograd, torch's clipping and torch.optim.AdamW."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8, foreach=False)
    for step in range(steps):
        total, aux, batches = 0.0, 0.0, global_step(step, ACCUMULATION)
        for batch in batches:
            output = model(**plain_inputs(batch), output_router_logits=True)
            logits = output.logits[0, :-1].float()
            tokens = torch.nn.functional.cross_entropy(logits, batch["labels"][0, 1:], reduction="sum")
            share = tokens / batch["num_items"] + 0.1 * output.aux_loss / len(batches)
            share.backward()
            total, aux = total + share.item(), aux + output.aux_loss.item() / len(batches)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        adamw.step()
        adamw.zero_grad()
        yield total, aux, norm.item()


def test_five_float32_steps_are_those_of_transformers_and_torch_adamw():
    # float32 sums in another order: a relative error of a few units in the last place, which training amplifies
    plain = plain_model()
    engine = local_engine(tiny_model())
    for step, (loss, aux, norm) in enumerate(plain_training(plain, steps=5)):
        result = engine.train_step(global_step(step, ACCUMULATION), lr=1e-2)
        assert result.loss.item() == pytest.approx(loss, rel=1e-5)
        assert result.aux_loss.item() == pytest.approx(aux, rel=1e-5)
        assert result.grad_norm.item() == pytest.approx(norm, rel=1e-4)
        assert norm > 0.5  # so that clipping is tested


def test_bfloat16_weights_follow_float32_masters():
    engine = local_engine(tiny_model(torch.bfloat16))
    before = {name: p.detach().clone() for name, p in engine.model.named_parameters()}
    # updates far below bfloat16's resolution of the weights: without masters they would all be lost
    for step in range(10):
        engine.train_step(global_step(step % 2, ACCUMULATION), lr=1e-5)
    norm_weight = "model.norm.weight"  # ones: a bfloat16 step there is 2^-8, ten updates come to 1e-4
    slot = engine.slots[norm_weight]
    assert torch.equal(engine.model.get_parameter(norm_weight), before[norm_weight])
    assert 1e-5 < (slot.master - 1).abs().max() < 2e-4
    for name, each in engine.slots.items():
        assert each.master.dtype == each.moments["exp_avg"].dtype == torch.float32
        assert torch.equal(each.parameter, each.master.bfloat16()), name


def test_bfloat16_gradients_of_micro_batches_are_summed_in_float32():
    engine, again = local_engine(tiny_model(torch.bfloat16)), tiny_model(torch.bfloat16)
    seen = {}
    engine.update = lambda lr, norm: seen.update({name: slot.gradient().clone() for name, slot in engine.slots.items()})
    batches = global_step(0, ACCUMULATION)
    engine.train_step(batches, lr=1e-2)
    expected = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in again.named_parameters()}
    for batch in batches:
        shares = {"num_items_in_batch": batch["num_items"], "output_aux_loss": True, "aux_loss_divisor": ACCUMULATION}
        again(**plain_inputs(batch), **shares).loss.backward()
        for name, parameter in again.named_parameters():
            expected[name] += parameter.grad
            parameter.grad = None
    for name, gradient in expected.items():
        assert seen[name].dtype == torch.float32
        if name == "lm_head.weight":  # added in place: a micro-batch's share is not rounded to bfloat16
            torch.testing.assert_close(seen[name], gradient, rtol=0, atol=2**-8 * gradient.abs().max().item())
        else:
            assert torch.equal(seen[name], gradient), name


def test_experts_and_head_add_their_gradients_to_the_sums_themselves(monkeypatch):
    through_autograd = []
    monkeypatch.setattr(local, "_add_and_free", lambda total, parameter: through_autograd.append(total))
    engine = local_engine(tiny_model(torch.bfloat16))
    summed = set()
    engine.update = lambda lr, norm: summed.update(name for name, slot in engine.slots.items() if slot.grad.any())
    engine.train_step(global_step(0, ACCUMULATION), lr=1e-2)
    for name, slot in engine.slots.items():
        came = sum(total is slot.grad for total in through_autograd)
        by_itself = ".experts." in name or name == "lm_head.weight"
        assert (came, name in summed) == ((0, True) if by_itself else (ACCUMULATION, False)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_two_runs_give_the_same_bits(dtype):
    assert losses(local_engine(tiny_model(dtype)), 4) == losses(local_engine(tiny_model(dtype)), 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_resumed_run_repeats_the_uninterrupted_one_bit_for_bit(tmp_path, dtype):
    uninterrupted = losses(local_engine(tiny_model(dtype)), 6)
    first = local_engine(tiny_model(dtype))
    begun = losses(first, 3)
    first.save(tmp_path)
    other = tiny_model(dtype)
    torch.nn.init.normal_(other.lm_head.weight)  # so that a load that does nothing is seen
    second = local_engine(other)
    second.load(tmp_path)
    assert begun + losses(second, 6, first=3) == uninterrupted


def test_activation_checkpointing_changes_no_bit_and_keeps_the_load_balancing_gradient():
    plain, checkpointed = local_engine(tiny_model()), local_engine(tiny_model(), activation_checkpointing="full")
    assert checkpointed.model.is_gradient_checkpointing
    for step in range(3):
        batches = global_step(step, ACCUMULATION)
        one, other = plain.train_step(batches, lr=1e-2), checkpointed.train_step(batches, lr=1e-2)
        assert one.loss == other.loss and one.aux_loss == other.aux_loss and one.grad_norm == other.grad_norm


def test_the_loss_does_not_depend_on_how_the_step_is_cut():
    batches = global_step(0, 4)
    whole = local_engine(tiny_model(), accumulation=4).train_step(batches, lr=0.0)
    shares = [
        local_engine(tiny_model(), accumulation=2).train_step(half, lr=0.0) for half in (batches[:2], batches[2:])
    ]
    # each half's load-balancing loss is a mean over two micro-batches: the whole's is the mean of both
    aux = sum(share.aux_loss.item() for share in shares) / 2
    tokens = sum(share.loss.item() - 0.1 * share.aux_loss.item() for share in shares)
    assert whole.aux_loss.item() == pytest.approx(aux, rel=1e-6)
    assert whole.loss.item() == pytest.approx(tokens + 0.1 * aux, rel=1e-6)


def test_the_expert_load_counts_every_route():
    result = local_engine(tiny_model()).train_step(global_step(0, ACCUMULATION), lr=0.0)
    assert result.expert_load.shape == (8,)
    assert result.expert_load.sum().item() == pytest.approx(1.0)
    assert result.expert_load.max() < 0.5  # top-2: no expert can have more than half


def test_a_model_without_experts_trains():
    result = local_engine(tiny_model(mlp_only_layers=[0, 1])).train_step(global_step(0, ACCUMULATION), lr=1e-2)
    assert result.expert_load is None and result.aux_loss.item() == 0
    assert torch.isfinite(result.loss)


def test_a_step_that_is_not_finite_changes_nothing_and_the_next_one_trains():
    engine = local_engine(tiny_model())
    engine.train_step(global_step(0, ACCUMULATION), lr=1e-2)
    before = state_of(engine)
    spoil = engine.model.lm_head.register_forward_hook(lambda module, inputs, output: output * float("inf"))
    assert not torch.isfinite(engine.train_step(global_step(1, ACCUMULATION), lr=1e-2).grad_norm)
    spoil.remove()
    for name, tensor in state_of(engine).items():
        assert torch.equal(tensor, before[name]), name
    assert torch.isfinite(engine.train_step(global_step(1, ACCUMULATION), lr=1e-2).grad_norm)
    assert not torch.equal(engine.model.lm_head.weight.flatten(), before["lm_head.weight", "weight"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="asks a GPU's driver")
def test_a_step_on_a_gpu_never_waits_for_the_device():
    engine = local_engine(tiny_model(torch.bfloat16, hidden_size=64, head_dim=16, moe_intermediate_size=32))
    engine.train_step(global_step(0, ACCUMULATION), lr=1e-2)  # compiles the kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = engine.train_step(global_step(1, ACCUMULATION), lr=1e-2)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(result.grad_norm)


def test_evaluation_is_the_mean_over_labels_and_leaves_training_as_it_was():
    engine = local_engine(tiny_model())
    batches = [batch for step in range(2) for batch in global_step(step, 2)]
    total, labels = 0.0, 0
    plain = plain_model()
    for batch in batches:
        output = plain(**plain_inputs(batch))
        count = int((batch["labels"][:, 1:] != -100).sum())
        total, labels = total + output.loss.item() * count, labels + count
    assert engine.evaluate(iter(batches)) == pytest.approx(total / labels, rel=1e-6)
    assert engine.model.training


def test_evaluation_without_a_label_is_nan():
    batch = global_step(0, 1)[0]
    batch["labels"] = torch.full_like(batch["labels"], -100)
    assert torch.tensor(local_engine(tiny_model()).evaluate([batch])).isnan()


def test_the_exported_model_has_the_hubs_layout_and_the_trained_weights(tmp_path):
    engine = local_engine(tiny_model())
    losses(engine, 2)
    engine.export(tmp_path)
    index = json.loads((tmp_path / "config.json").read_text())
    assert index["architectures"] == ["Qwen3MoeForCausalLM"]
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert "model.layers.0.mlp.experts.7.down_proj.weight" in file.keys()  # noqa: SIM118  (not a dict)
    again = Qwen3MoeForCausalLM.from_pretrained(tmp_path)
    for (name, one), (_, other) in zip(engine.model.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(one, other), name


def test_tied_embeddings_are_trained_saved_and_exported_once(tmp_path):
    engine = local_engine(tiny_model(tie_word_embeddings=True))
    assert "lm_head.weight" not in engine.slots
    losses(engine, 2)
    engine.save(tmp_path)
    again = local_engine(tiny_model(tie_word_embeddings=True))
    again.load(tmp_path)
    assert losses(again, 3, first=2) == losses(engine, 3, first=2)
    engine.export(tmp_path / "export")
    loaded = Qwen3MoeForCausalLM.from_pretrained(tmp_path / "export")
    assert torch.equal(loaded.lm_head.weight, engine.model.lm_head.weight.cpu())


def test_a_wrong_number_of_micro_batches_is_refused():
    with pytest.raises(ValueError, match="train_step needs 3 micro-batches, got 2"):
        local_engine(tiny_model()).train_step(global_step(0, 2), lr=1e-2)


def test_a_model_of_plain_transformers_is_refused_with_what_to_call():
    with pytest.raises(ValueError, match=r"call tilestack\.enable\(model\)"):
        local_engine(plain_model())


def test_weights_of_a_dtype_that_is_not_trained_are_refused():
    with pytest.raises(ValueError, match=r"all float32 or all bfloat16, got torch\.float16"):
        local_engine(tiny_model(torch.float16))


class TestLoadingADamagedCheckpoint:
    @pytest.fixture
    def folder(self, tmp_path):
        local_engine(tiny_model()).save(tmp_path)
        return tmp_path

    def test_a_missing_file_is_said(self, folder):
        (folder / "pieces-00000-0000.safetensors").unlink()
        with pytest.raises(
            CheckpointError, match=r"lacks .*: a file is missing, or the checkpoint is of another model"
        ):
            local_engine(tiny_model()).load(folder)

    def test_a_missing_part_of_a_weight_is_said(self, folder):
        path = folder / "pieces-00000-0000.safetensors"
        tensors = load_file(path)
        tensors["lm_head.weight:7:exp_avg"] = tensors.pop("lm_head.weight:0:exp_avg")[7:].contiguous()
        save_file(tensors, path)
        with pytest.raises(CheckpointError, match=r"has 0 elements of lm_head.weight \(exp_avg\), the model has 3072"):
            local_engine(tiny_model()).load(folder)

    def test_a_truncated_file_is_named(self, folder):
        path = folder / "pieces-00000-0000.safetensors"
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(CheckpointError, match=r"pieces-00000-0000\.safetensors is damaged or truncated"):
            local_engine(tiny_model()).load(folder)

    def test_another_model_is_refused_and_nothing_is_half_loaded(self, folder):
        engine = local_engine(tiny_model(vocab_size=100))
        before = {name: p.detach().clone() for name, p in engine.model.named_parameters()}
        with pytest.raises(CheckpointError, match="the checkpoint is of another model"):
            engine.load(folder)
        assert all(torch.equal(p, before[name]) for name, p in engine.model.named_parameters())

    def test_another_precision_is_refused(self, folder):
        with pytest.raises(
            CheckpointError, match=r"saved with dtype='torch\.float32', this run has dtype='torch\.bfloat16'"
        ):
            local_engine(tiny_model(torch.bfloat16)).load(folder)

    def test_a_folder_without_engine_json_is_no_checkpoint(self, folder):
        (folder / "engine.json").unlink()
        with pytest.raises(CheckpointError, match=r"holds no engine\.json"):
            local_engine(tiny_model()).load(folder)

    @pytest.mark.parametrize("content", ["{", "[]", '{"format": "pieces-1", "dtype": "torch.float32"}'])
    def test_a_broken_engine_json_is_named(self, content, folder):
        (folder / "engine.json").write_text(content)
        with pytest.raises(CheckpointError, match=r"engine\.json is broken: "):
            local_engine(tiny_model()).load(folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_whole_step_with_clipping_and_update_reads_nothing_from_the_device(dtype, monkeypatch):
    # on a CPU this looks at values, where there is nothing to wait for
    monkeypatch.setattr("tilestack.models.packing._check_cu_seqlens", lambda *_: None)
    engine = local_engine(tiny_model(dtype))
    updates = []
    monkeypatch.setattr("tilestack.distributed.local.adamw", lambda *_, **options: updates.append(options))
    batches = global_step(0, ACCUMULATION)
    with NoHostReads():
        engine.train_step(batches, lr=1e-2)
    assert len(updates) == len(engine.slots) and all(each["grad_scale"].ndim == 0 for each in updates)
