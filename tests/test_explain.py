"""`tilestack explain`: what would run, and why not the others."""

import dataclasses

import pytest

from tilestack.app.cli import main
from tilestack.app.config import Config, DataConfig, ModelConfig
from tilestack.app.errors import UserError
from tilestack.app.explain import explain, named_device, training_calls
from tilestack.app.model import new_config
from tilestack.distributed import DistributedConfig, SettingsError
from tilestack.kernels import ops

QWEN = Config(
    model=ModelConfig(dtype="bfloat16", layers=4, hidden=2048, heads=32, kv_heads=4, head_dim=128, experts=128,
                      experts_per_token=8, expert_hidden=768, max_positions=4096),
    data=DataConfig(vocab_size=151936, sequence_length=4096, micro_batch_tokens=16384),
)  # fmt: skip
H100, CPU = named_device("sm_90"), named_device("cpu")


def paragraph(text: str, op: str) -> list[str]:
    """The lines about one op."""
    lines = [line.strip() for line in text.splitlines()]
    start = next(index for index, line in enumerate(lines) if line.startswith((f"{op} (", f"{op}:")))
    return lines[start : lines.index("", start) if "" in lines[start:] else len(lines)]


def test_what_ranks_share_is_in_the_picture_and_a_split_that_cannot_be_is_refused():
    split = dataclasses.replace(QWEN, distributed=DistributedConfig(expert_parallel=4, sequence_parallel=2))
    text = explain(split, H100)
    assert "experts    split over 4 ranks, tokens sent in 2 parts" in text and "rows       split over 2 ranks" in text
    with pytest.raises(SettingsError, match="must divide the model's 128 experts"):
        explain(dataclasses.replace(QWEN, distributed=DistributedConfig(expert_parallel=3)), H100)


def test_the_picture_has_its_five_boxes_in_order():
    text = explain(QWEN, H100)
    boxes = ["APPLICATION", "DISTRIBUTED TRAINING", "MODEL ARCHITECTURES", "OPTIMIZED KERNELS", "CUDA, cuBLAS, cuDNN"]
    places = [text.index(f"\n{box}") if index else text.index(box) for index, box in enumerate(boxes)]
    assert places == sorted(places)
    assert text.isascii() and "\x1b" not in text


def test_on_hopper_packed_attention_is_ours_and_every_other_one_has_its_reason():
    first, *rest = paragraph(explain(QWEN, H100), "attention")
    assert first == "attention (q [16384, 32, 128], bfloat16): tilestack"
    text = "\n".join(rest)
    for name in ("cudnn: has no packed input", "tilestack-triton: would take it, but comes after tilestack"):
        assert f"not {name}" in text
    others = {each.name for each in ops()["attention"].implementations} - {"tilestack"}
    assert {line.split(":")[0].removeprefix("not ") for line in rest if line.startswith("not ")} == others


def test_an_adapter_that_was_never_run_hardly_or_failed_says_so():
    lines = paragraph(explain(QWEN, H100), "attention")
    says = {
        "flash-attn-2": "never against the package itself",
        "flash-attn-4": "in one case against the package itself",
        "xformers": "against the package itself the adapter failed",
    }
    for name, how in says.items():
        index = next(index for index, line in enumerate(lines) if line.startswith(f"not {name}:"))
        assert how in lines[index + 1]


def test_ops_that_the_training_never_calls_share_one_line():
    text = explain(QWEN, H100)
    (line,) = (line for line in text.splitlines() if "not called by this training" in line)
    called = {name for name in ops() if any(each.startswith(f"  {name} (") for each in text.splitlines())}
    assert set(line.split(": ")[1].split(", ")) == set(ops()) - called and "attention" in called


def test_on_a_cpu_every_op_is_the_reference():
    text = explain(QWEN, CPU)
    calls = training_calls(QWEN, new_config(QWEN.model, 100, 0), CPU)
    assert all(paragraph(text, op)[0].endswith(": reference") for op in calls)


def test_what_no_implementation_takes_is_said_and_not_hidden():
    odd = dataclasses.replace(QWEN, model=dataclasses.replace(QWEN.model, head_dim=300))
    first, *rest = paragraph(explain(odd, H100), "attention")
    assert first.endswith(": NOTHING RUNS IT")
    assert any(line.startswith("not tilestack-triton: takes head dimensions") for line in rest)


@pytest.mark.parametrize("config", [Config(), QWEN], ids=["small", "Qwen3-30B-A3B"])
def test_the_calls_name_every_input_of_their_op(config):
    calls = training_calls(config, new_config(config.model, config.data.vocab_size, 0), H100)
    elsewhere = {"attention_kvcache", "kv_cache_append"}  # decoding, or flash-attn's interface
    elsewhere |= {"rotary", "layer_norm", "cross_entropy", "cross_entropy_gradient"}
    assert set(calls) == set(ops()) - elsewhere - {"swiglu"}
    for name, call in calls.items():
        contract = ops()[name].contract
        given = {each for each, tensor in call.tensors.items() if tensor is not None}
        required = {each for each in contract.inputs if not each.endswith("?")}
        assert required <= given <= set(call.tensors) == set(contract.input_names)
        assert isinstance(call.params, contract.params)


def test_dense_layers_bring_swiglu():
    shape = new_config(QWEN.model, 100, 0)
    shape.mlp_only_layers = [1]
    assert training_calls(QWEN, shape, H100)["swiglu"].shape("gate") == (1, 16384, shape.intermediate_size)


@pytest.mark.parametrize("name", ["hopper", "sm90", "sm_9", "gfx", ""])
def test_a_device_that_is_none_is_refused(name):
    with pytest.raises(UserError, match="--device must be cpu, an architecture like sm_90"):
        named_device(name)


def test_the_command_takes_the_options_of_train(capsys):
    assert main(["explain", "--device", "gfx942", "--data.micro_batch_tokens", "2048"]) == 0
    printed = capsys.readouterr().out
    assert "packed to 2,048 tokens" in printed and "needs an NVIDIA GPU, this is gfx942" in printed


def test_the_command_refuses_an_unknown_option(capsys):
    with pytest.raises(SystemExit):
        main(["explain", "--model.layer", "3"])
    assert "model.layers" in capsys.readouterr().err


def test_help_says_what_device_means(capsys):
    assert main(["explain", "--help"]) == 0
    assert "--device NAME" in capsys.readouterr().out


def test_an_implementation_that_the_configuration_names_is_the_one_that_runs_or_nothing():
    def asking(name):
        return dataclasses.replace(QWEN, kernels=dataclasses.replace(QWEN.kernels, attention=name))

    first, *rest = paragraph(explain(asking("reference"), H100), "attention")
    assert first.endswith(": reference")
    assert "not tilestack: would take it, but kernels asks for reference" in rest
    assert paragraph(explain(asking("cudnn"), H100), "attention")[0].endswith(": NOTHING RUNS IT")
