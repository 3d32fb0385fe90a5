"""Weights read part by part: from a checkpoint as from_pretrained reads it, or drawn, the same for any split."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_qwen3_moe import Plain, plain_model, tiny_config

from tilestack import Qwen3MoeForCausalLM
from tilestack.models import drawn, materialise, pretrained

CPU = torch.device("cpu")
CHANGES = [{}, {"mlp_only_layers": [0]}, {"tie_word_embeddings": True}, {"attention_bias": True}]


def filled(model, weights) -> torch.nn.Module:
    materialise(model, weights, CPU)
    return model


def assert_equal(found: torch.nn.Module, expected: torch.nn.Module) -> None:
    ours, theirs = found.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor), name
    for name, buffer in expected.named_buffers():
        assert torch.equal(dict(found.named_buffers())[name], buffer), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_an_outline_filled_from_a_checkpoint_is_what_from_pretrained_gives(tmp_path, dtype, changes):
    plain_model(**changes).save_pretrained(tmp_path, max_shard_size="100KB")
    model, weights = pretrained(tmp_path, dtype)
    assert {each.device.type for each in model.parameters()} == {"meta"}
    assert_equal(filled(model, weights), Qwen3MoeForCausalLM.from_pretrained(tmp_path, dtype=dtype))
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == changes.get("tie_word_embeddings", False)
    ids = torch.arange(2, 14)[None]
    expected = Plain.from_pretrained(tmp_path, dtype=dtype)(ids).logits
    torch.testing.assert_close(model(ids).logits, expected, rtol=2**-5, atol=2**-5)


def test_a_checkpoint_with_fused_experts_is_read_too(tmp_path):
    plain = plain_model()
    plain.save_pretrained(tmp_path)
    save_file(plain.state_dict(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert_equal(filled(*pretrained(tmp_path, torch.float32)), plain)


@pytest.mark.parametrize("source", ["stored", "drawn"])
def test_any_part_of_a_parameter_is_that_part_of_the_whole(tmp_path, source, monkeypatch):
    monkeypatch.setattr("tilestack.models.weights.BLOCK", 1000)
    plain_model().save_pretrained(tmp_path)
    make = {
        "stored": lambda: pretrained(tmp_path, torch.float32),
        "drawn": lambda: drawn(tiny_config(), torch.float32, 3),
    }
    whole = dict(filled(*make[source]()).named_parameters())
    _, weights = make[source]()
    for name, parameter in whole.items():
        size = parameter.numel()
        for start, end in ((0, 1), (size // 3, 2 * size // 3 + 1), (size - 1, size), (size, size)):
            part = torch.full((end - start,), torch.nan)
            weights.fill(name, start, part)
            assert torch.equal(part, parameter.detach().view(-1)[start:end]), (name, start, end)


def test_new_weights_are_distributed_as_transformers_draws_them():
    found = filled(*drawn(tiny_config(pad_token_id=5), torch.float32, 0))
    theirs = Plain(tiny_config(pad_token_id=5))
    for name, parameter in theirs.named_parameters():
        ours = found.get_parameter(name)
        if parameter.dim() == 1:
            assert torch.equal(ours, parameter), name
        else:
            count = parameter.numel()
            assert ours.std().item() == pytest.approx(parameter.std().item(), rel=6 * count**-0.5), name
            assert abs(ours.mean().item()) < 6 * theirs.config.initializer_range * count**-0.5, name
    assert not found.model.embed_tokens.weight[5].any()


def test_new_weights_depend_on_the_seed_and_no_two_parameters_are_alike():
    first, second = (filled(*drawn(tiny_config(), torch.float32, seed)) for seed in (0, 1))
    assert not torch.equal(first.lm_head.weight, second.lm_head.weight)
    experts = [layer.mlp.experts.down_proj.flatten()[:100] for layer in first.model.layers]
    assert not torch.equal(*experts)


def test_bfloat16_weights_are_the_float32_ones_rounded():
    wide, narrow = (filled(*drawn(tiny_config(), dtype, 0)) for dtype in (torch.float32, torch.bfloat16))
    for name, parameter in wide.named_parameters():
        assert torch.equal(parameter.bfloat16(), narrow.get_parameter(name)), name


def lose_a_parameter(tensors):
    del tensors["model.layers.1.mlp.experts.3.up_proj.weight"]


def change_a_shape(tensors):
    tensors["model.norm.weight"] = torch.ones(7)


def quantise(tensors):
    tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.int8)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lose_a_parameter, r"lacks 1 of the model's parameters: model.layers.1.mlp.experts.3.up_proj.weight"),
        (change_a_shape, r"model.norm.weight must be \[\d+\] in one of .*, got \[7\] in F32"),
        (quantise, r"lm_head.weight must be .*, got .* in I8: of another model, or quantised"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_before_anything_is_read(tmp_path, damage, message):
    plain_model().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    damage(tensors)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message):
        pretrained(tmp_path, torch.float32)
