"""enable(model) on models that exist, and the names that plain transformers knows us by."""

import copy
import subprocess
import sys

import pytest
import torch
from tiny_qwen3_moe import Plain, assert_same, ours_like, plain_model, tokens
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from tilestack import KernelChoice, Qwen3MoeForCausalLM, enable
from tilestack.kernels import ops

DEVICE = torch.device(
    "cuda" if torch.cuda.is_available() else "cpu"
)  # Triton runs in the interpreter only without a GPU


def used_ops(model, inputs) -> set[str]:
    """The names of our custom ops that one forward runs."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile, torch.no_grad():
        model(**inputs)
    return {event.key.split("::")[1] for event in profile.key_averages() if event.key.startswith("tilestack::")}


ALL_OPS = {
    f"{op}_forward_reference"
    for op in ("attention", "linear_cross_entropy", "moe", "qk_norm_rope", "rms_norm", "router", "swiglu")
}


def test_importing_tilestack_does_not_import_transformers():
    code = "import sys, tilestack, tilestack.kernels; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_op_runs_in_a_model_of_ours_and_in_an_enabled_one():
    ids = tokens(1, 8)
    inputs = {"input_ids": ids, "labels": ids}
    plain = plain_model(mlp_only_layers=[1])
    assert used_ops(plain, inputs) == set()
    assert used_ops(ours_like(plain), inputs) >= ALL_OPS
    enable(plain)
    assert used_ops(plain, inputs) >= ALL_OPS


def test_report_counts_what_was_replaced():
    report = enable(plain_model(mlp_only_layers=[1]))
    assert report.replaced == {
        "LMHead": 1,
        "Qwen3MoeAttention": 2,
        "Qwen3MoeDecoderLayer": 2,
        "Qwen3MoeExperts": 1,
        "Qwen3MoeForCausalLM": 1,
        "Qwen3MoeMLP": 1,
        "Qwen3MoeModel": 1,
        "Qwen3MoeRMSNorm": 9,
        "Qwen3MoeSparseMoeBlock": 1,
        "Qwen3MoeTopKRouter": 1,
    }
    assert report.left_alone == {}
    assert "9 x Qwen3MoeRMSNorm" in str(report)


def test_report_names_the_implementations_that_run():
    model = plain_model(mlp_only_layers=[1]).to(DEVICE)
    report = enable(model, {"moe": "tilestack-triton", "router": "reference"})
    found = report.implementations()
    assert (found["moe"], found["router"]) == ("tilestack-triton", "reference")
    assert f"attention, packed: {found.pop('attention, packed')}" in str(report)
    ids = tokens(1, 4).to(DEVICE)
    ran = used_ops(model, {"input_ids": ids, "labels": ids})
    for op, name in found.items():
        suffix = next(each.suffix for each in ops()[op].implementations if each.name == name)
        assert {each for each in ran if each.startswith(f"{op}_forward_")} == {f"{op}_forward_{suffix}"}


def test_report_says_why_a_named_implementation_refuses():
    report = enable(plain_model().double(), {"rms_norm": "tilestack-triton"})
    assert report.implementations()["rms_norm"].startswith("refused: rms_norm: implementation='tilestack-triton'")


def test_undo_restores_everything():
    model, untouched = plain_model(), plain_model()
    classes = {name: type(module) for name, module in model.named_modules()}
    ids = tokens(2, 8)
    model(ids, output_router_logits=True)  # transformers installs its recording hooks at the first call
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    report = enable(model)
    model(ids, output_router_logits=True)
    report.undo()
    report.undo()
    assert {name: type(module) for name, module in model.named_modules()} == classes
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    assert model.config._attn_implementation == "sdpa"
    assert model.config._experts_implementation == "grouped_mm"
    assert used_ops(model, {"input_ids": ids}) == set()
    assert torch.equal(model(ids).logits, untouched(ids).logits)


def test_enabling_twice_changes_the_choice_and_undo_goes_one_step_back():
    model = plain_model()
    enable(model, {"router": "reference"})
    second = enable(model, {"rms_norm": "reference"})
    assert model.model.norm.kernels == KernelChoice(rms_norm="reference")
    second.undo()
    assert model.model.norm.kernels == KernelChoice(router="reference")


def test_another_architecture_is_refused():
    llama = LlamaForCausalLM(
        LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    )
    with pytest.raises(ValueError, match="LlamaForCausalLM has no module of transformers' Qwen3-MoE"):
        enable(llama)


def test_unknown_ops_and_implementations_name_the_nearest():
    with pytest.raises(ValueError, match="'atention' is not one of .* did you mean 'attention'"):
        enable(plain_model(), {"atention": "auto"})
    with pytest.raises(ValueError, match="moe='referense' is not one of .* did you mean 'reference'"):
        KernelChoice(moe="referense")


def test_a_named_implementation_is_the_one_that_runs():
    model = ours_like(plain_model(), kernels={"rms_norm": "tilestack-triton"}).to(DEVICE)
    ran = used_ops(model, {"input_ids": tokens(1, 4).to(DEVICE)})
    assert {each for each in ran if each.startswith("rms_norm_")} == {"rms_norm_forward_triton"}


def test_what_our_ops_cannot_do_is_left_to_transformers():
    plain = plain_model(hidden_act="gelu", mlp_only_layers=[0])
    report = enable(copy.deepcopy(plain))
    assert set(report.left_alone) == {"experts", "model.layers.0.mlp"}
    assert "hidden_act is 'gelu'" in report.left_alone["experts"]
    ids = tokens(2, 8)
    plain.eval()
    torch.testing.assert_close(ours_like(plain)(ids).logits, plain(ids).logits)


def test_attention_dropout_drops_in_training_alone_and_follows_torchs_seed():
    plain = plain_model(attention_dropout=0.5)
    model, ids = ours_like(plain), tokens(2, 8)

    def run():
        torch.manual_seed(0)
        return model(ids).logits

    assert "attention_forward_reference" in used_ops(model, {"input_ids": ids})
    dropped = run()
    assert torch.equal(run(), dropped)
    expected = plain.eval()(ids).logits
    assert (dropped - expected).abs().max() > 1e-3
    model.eval()
    torch.testing.assert_close(run(), expected)


def test_plain_transformers_knows_us_by_name(tmp_path):
    plain = plain_model()
    plain.save_pretrained(tmp_path)
    named = AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="tilestack", experts_implementation="tilestack"
    ).train()
    assert type(named) is Plain
    ids = tokens(2, 12)
    ran = used_ops(named, {"input_ids": ids, "labels": ids})
    assert {"attention_forward_reference", "moe_forward_reference"} <= ran
    positions = torch.cat([torch.arange(7), torch.arange(5)]).expand(2, -1)
    right = {"input_ids": ids, "labels": ids, "position_ids": positions, "use_cache": False}
    for inputs in (right, right | {"use_cache": True, "attention_mask": torch.ones_like(ids)}):
        outputs = named(**inputs)
        torch.testing.assert_close(outputs.logits, plain(**right).logits)


def test_plain_transformers_by_name_takes_padding():
    plain = plain_model()
    named = copy.deepcopy(plain)
    named.set_attn_implementation("tilestack")
    ids, mask = tokens(2, 10), torch.ones(2, 10, dtype=torch.long)
    mask[0, :4] = 0
    for inputs in ({"attention_mask": mask}, {"attention_mask": mask.flip(1)}, {}):
        valid = inputs.get("attention_mask", torch.ones_like(ids)).bool()
        torch.testing.assert_close(named(ids, **inputs).logits[valid], plain(ids, **inputs).logits[valid])


def test_positions_changed_in_place_are_seen():
    plain = plain_model()
    named = copy.deepcopy(plain)
    named.set_attn_implementation("tilestack")
    ids, positions = tokens(1, 8), torch.arange(8).unsqueeze(0)
    named(ids, position_ids=positions)
    positions[0, 4:] -= 4
    torch.testing.assert_close(
        named(ids, position_ids=positions).logits, plain(ids, position_ids=positions, use_cache=False).logits
    )


def test_another_attention_of_transformers_still_works():
    plain = plain_model()
    ours = ours_like(plain)
    ours.set_attn_implementation("eager")
    ours.set_experts_implementation("eager")
    ids = tokens(2, 8)
    assert_same(ours, plain, {"input_ids": ids, "labels": ids})
    assert ours(ids, output_attentions=True).attentions[0].shape == (2, 4, 8, 8)


def test_cu_seqlens_are_not_dropped_by_an_attention_that_does_not_know_them():
    ours = ours_like(plain_model())
    ours.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="would attend across documents"):
        ours(tokens(1, 8), cu_seq_lens_q=torch.tensor([0, 3, 8], dtype=torch.int32))


@pytest.mark.parametrize(
    ("cu_seqlens", "message"),
    [
        (torch.tensor([0, 3, 7]), "from 0 to the number of tokens of the batch .8., got 0 to 7"),
        (torch.tensor([[0, 8]]), r"integers \[documents \+ 1\]"),
    ],
)
def test_cu_seqlens_that_do_not_fit_are_refused(cu_seqlens, message):
    with pytest.raises(ValueError, match=message):
        ours_like(plain_model())(tokens(1, 8), cu_seq_lens_q=cu_seqlens)


def test_a_mask_of_zeros_is_refused():
    with pytest.raises(ValueError, match="must have a token that counts"):
        ours_like(plain_model())(tokens(1, 8), attention_mask=torch.zeros(1, 8, dtype=torch.long))


class Wrapper(torch.nn.Module):
    """A module around the experts, as PEFT makes them."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *arguments):
        return self.inner(*arguments)


@pytest.mark.parametrize("experts", ["tilestack", "eager"])
def test_experts_inside_a_wrapper_work(experts):
    plain = plain_model()
    ours = ours_like(plain)
    ours.set_experts_implementation(experts)
    for layer in ours.model.layers:
        layer.mlp.experts = Wrapper(layer.mlp.experts)
    ids = tokens(2, 8)
    torch.testing.assert_close(ours(ids).logits, plain(ids).logits)


def test_ours_is_transformers_class():
    assert issubclass(Qwen3MoeForCausalLM, Plain)
    ours = ours_like(plain_model())
    for name, module in ours.named_modules():
        if name != "lm_head" and type(module).__module__.startswith("tilestack"):
            assert type(module).__name__ in {kind.__name__ for kind in type(module).__mro__[1:]}, name
    copied = copy.deepcopy(ours)
    ids = tokens(1, 4)
    assert torch.equal(copied(ids).logits, ours(ids).logits)
