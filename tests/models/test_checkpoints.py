"""Checkpoints go both ways between ours and plain transformers, bit for bit."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_qwen3_moe import Plain, ours_like, plain_model

from tilestack import Qwen3MoeForCausalLM
from tilestack.models.export import write_model

SHARD = "100KB"  # several shards


def hub_tensors(folder) -> dict[str, torch.Tensor]:
    return {name: tensor for shard in folder.glob("*.safetensors") for name, tensor in load_file(shard).items()}


def assert_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changes", [{}, {"mlp_only_layers": [0]}, {"tie_word_embeddings": True}], ids=str)
def test_ours_loads_what_transformers_wrote_and_writes_it_again(tmp_path, dtype, changes):
    plain = plain_model(**changes).to(dtype)
    plain.save_pretrained(tmp_path / "plain", max_shard_size=SHARD)
    names = hub_tensors(tmp_path / "plain")
    assert "model.layers.1.mlp.experts.7.gate_proj.weight" in names
    assert len(list((tmp_path / "plain").glob("*.safetensors"))) > 2

    ours = Qwen3MoeForCausalLM.from_pretrained(tmp_path / "plain", dtype=dtype)
    assert ours.config._attn_implementation == ours.config._experts_implementation == "tilestack"
    assert_equal(ours.state_dict(), plain.state_dict())

    ours.save_pretrained(tmp_path / "ours", max_shard_size=SHARD)
    assert_equal(hub_tensors(tmp_path / "ours"), names)
    assert_equal(Plain.from_pretrained(tmp_path / "ours", dtype=dtype).state_dict(), plain.state_dict())


def test_a_model_that_was_never_loaded_is_written_in_the_hub_layout(tmp_path):
    ours = ours_like(plain_model())
    ours.save_pretrained(tmp_path)
    assert "model.layers.0.mlp.experts.0.down_proj.weight" in hub_tensors(tmp_path)
    assert_equal(Plain.from_pretrained(tmp_path).state_dict(), ours.state_dict())


@pytest.mark.parametrize("changes", [{}, {"mlp_only_layers": [0]}, {"tie_word_embeddings": True}], ids=str)
@pytest.mark.parametrize("file_bytes", [1 << 30, 100_000], ids=["one file", "many files"])
def test_what_is_written_part_by_part_is_what_save_pretrained_writes(tmp_path, changes, file_bytes, monkeypatch):
    monkeypatch.setattr("tilestack.models.export.FILE_BYTES", file_bytes)
    ours = ours_like(plain_model(**changes))
    ours.generation_config.max_new_tokens = 5
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    ours.save_pretrained(tmp_path / "whole")

    def parts():
        for name, parameter in ours.named_parameters():
            first = 0
            for part in parameter.detach().split(3 if "experts" in name else parameter.shape[0]):
                yield name, first, part
                first += part.shape[0]

    write_model(ours, parts(), tmp_path / "parts")
    assert_equal(hub_tensors(tmp_path / "parts"), hub_tensors(tmp_path / "whole"))
    for name in ("config.json", "generation_config.json"):
        assert (tmp_path / "parts" / name).read_text() == (tmp_path / "whole" / name).read_text()
    files = list((tmp_path / "parts").glob("*.safetensors"))
    assert len(files) == 1 if file_bytes > 1 << 20 else len(files) > 2
    assert all(path.stat().st_size < file_bytes + 20_000 for path in files)
    assert_equal(Plain.from_pretrained(tmp_path / "parts").state_dict(), ours.state_dict())


YARN = {"rope_type": "yarn", "rope_theta": 5e5, "factor": 4.0, "original_max_position_embeddings": 32}


@pytest.mark.parametrize("rope", [{"rope_type": "default", "rope_theta": 5e5}, YARN], ids=["default", "yarn"])
def test_config_has_the_keys_of_transformers_4_and_means_the_same_to_5(tmp_path, rope):
    plain = plain_model(rope_parameters=rope)
    plain.save_pretrained(tmp_path / "plain")
    ours_like(plain).save_pretrained(tmp_path / "ours")
    written = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert written["num_experts"] == 8
    assert written["rope_theta"] == 5e5
    assert written["rope_scaling"] == (
        None if rope["rope_type"] == "default" else {k: v for k, v in rope.items() if k != "rope_theta"}
    )
    assert written["architectures"] == ["Qwen3MoeForCausalLM"]
    again = Plain.from_pretrained(tmp_path / "ours").config
    assert again.rope_parameters == plain.config.rope_parameters
    assert again.num_experts == 8
    once_more = tmp_path / "once more"
    Plain.from_pretrained(tmp_path / "ours").save_pretrained(once_more)
    theirs = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert json.loads((once_more / "config.json").read_text()) == theirs
    assert not list((tmp_path / "ours").glob("*.new"))


def test_the_choice_of_kernels_is_an_argument_of_from_pretrained_and_not_saved(tmp_path):
    plain_model().save_pretrained(tmp_path / "plain")
    ours = Qwen3MoeForCausalLM.from_pretrained(tmp_path / "plain", kernels={"moe": "reference"})
    assert ours.model.layers[0].mlp.experts.kernels.moe == "reference"
    ours.save_pretrained(tmp_path / "ours")
    assert "reference" not in (tmp_path / "ours" / "config.json").read_text()


@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_an_attention_that_the_user_names_is_used(tmp_path, name):
    plain_model().save_pretrained(tmp_path)
    ours = Qwen3MoeForCausalLM.from_pretrained(tmp_path, attn_implementation=name, experts_implementation="grouped_mm")
    assert ours.config._attn_implementation == name
    assert ours.config._experts_implementation == "grouped_mm"


def test_building_ours_leaves_the_callers_config_alone():
    plain = plain_model()
    before = plain.config.to_dict() | {"attention": plain.config._attn_implementation}
    Qwen3MoeForCausalLM(plain.config)
    assert plain.config.to_dict() | {"attention": plain.config._attn_implementation} == before


def break_missing(folder):
    sorted(folder.glob("*.safetensors"))[1].unlink()


def break_truncated(folder):
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])


def break_architecture(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))


def break_parameter(folder):
    for shard in folder.glob("*.safetensors"):
        tensors = load_file(shard)
        if tensors.pop("model.norm.weight", None) is not None:
            save_file(tensors, shard, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_missing, r"model-00002-of-\d+.safetensors: missing, but .*index.json lists it"),
        (break_truncated, r"model-00002-of-\d+.safetensors: truncated or no safetensors file"),
        (break_architecture, r"model_type must be 'qwen3_moe', got 'llama'"),
        (break_parameter, r"lacks 1 of the model's parameters: model.norm.weight"),
    ],
)
def test_a_broken_checkpoint_is_refused(tmp_path, damage, message):
    plain_model().save_pretrained(tmp_path, max_shard_size=SHARD)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message):
        Qwen3MoeForCausalLM.from_pretrained(tmp_path)
