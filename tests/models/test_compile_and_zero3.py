"""torch.compile, and what DeepSpeed's ZeRO-3 does to a model that is being built."""

import copy

import pytest
import torch
from host_reads import NoHostReads
from tiny_qwen3_moe import Qwen3MoeForCausalLM, ours_like, plain_model, tokens

from tilestack.models import ZERO3_LEAF_CLASSES, restore_rotary_frequencies
from tilestack.models.packing import Packing

PACKING = Packing(torch.tensor([0, 5, 12], dtype=torch.int32), 7)


@pytest.mark.parametrize("packing", [None, PACKING], ids=["dense", "packed"])
@pytest.mark.parametrize("layer", [0, 1], ids=["MoE", "dense MLP"])
def test_a_layer_compiles_into_one_graph(layer, packing):
    ours = ours_like(plain_model(mlp_only_layers=[1]))
    module = ours.model.layers[layer]
    hidden = torch.randn(1, 12, 64)
    arguments = {
        "position_embeddings": ours.model.rotary_emb(hidden, torch.arange(12).unsqueeze(0)),
        "attention_mask": None,
        "packing": packing,
        "router_statistics": layer == 0,
    }
    results = []
    for run in (module, torch.compile(module, backend="aot_eager", fullgraph=True)):
        module.zero_grad()
        x = hidden.clone().requires_grad_()
        out = run(x, **arguments)
        out = out if isinstance(out, tuple) else (out,)
        (out[0].square().sum() + out[-1].square().sum()).backward()
        results.append([*out, x.grad, *[parameter.grad for parameter in module.parameters()]])
    for compiled, right in zip(*reversed(results), strict=True):
        torch.testing.assert_close(compiled, right)


def test_a_training_step_compiles_without_a_graph_break():
    ours = ours_like(plain_model())
    ids = tokens(1, 12)
    inputs = {"labels": ids, "cu_seq_lens_q": PACKING.cu_seqlens, "max_length_q": 7, "output_aux_loss": True}
    right = ours(ids, **inputs)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)(ids, **inputs)
    torch.testing.assert_close(compiled.loss, right.loss)
    torch.testing.assert_close(compiled.tokens_per_expert, right.tokens_per_expert)


@pytest.mark.parametrize("packed", [False, True])
def test_a_training_step_reads_nothing_from_the_device(packed, monkeypatch):
    monkeypatch.setattr("tilestack.models.packing._check_cu_seqlens", lambda *_: None)  # reads on a CPU alone
    ours = ours_like(plain_model())
    ids = tokens(1, 12)
    inputs = {"labels": ids, "num_items_in_batch": torch.tensor(11), "output_aux_loss": True}
    if packed:
        inputs |= {"cu_seq_lens_q": PACKING.cu_seqlens, "max_length_q": 7}
    with NoHostReads():
        ours(ids, **inputs).loss.backward()


def assert_frequencies(model, right) -> None:
    for name in ("inv_freq", "original_inv_freq"):
        buffer = getattr(model.model.rotary_emb, name)
        assert buffer.dtype == torch.float32
        assert torch.equal(buffer, getattr(right.model.rotary_emb, name))


ROPES = {
    "default": {"rope_type": "default", "rope_theta": 1e6},
    "yarn": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1e6, "factor": 2.0},
}


@pytest.fixture
def arange_in_bf16(monkeypatch):
    """What deepspeed.zero.Init does to torch.arange in a bf16 run (partition_parameters.py)."""
    arange = torch.arange

    def wrapped(*args, **kwargs):
        made = arange(*args, **kwargs)
        return made.to(torch.bfloat16) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "arange", wrapped)
    return lambda: monkeypatch.setattr(torch, "arange", arange)


def test_frequencies_that_zero_init_made_in_bf16_are_restored(arange_in_bf16):
    broken = ours_like(plain_model())
    assert broken.model.rotary_emb.inv_freq.dtype == torch.bfloat16
    arange_in_bf16()
    assert restore_rotary_frequencies(broken) == 1
    assert_frequencies(broken, plain_model())


@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES.keys())
def test_frequencies_of_a_model_that_was_cast_to_bf16_are_restored(rope):
    plain = plain_model(rope_parameters=rope)
    ours = ours_like(plain).bfloat16()
    assert ours.model.rotary_emb.inv_freq.dtype == torch.bfloat16
    restore_rotary_frequencies(ours)
    assert_frequencies(ours, plain)


def test_from_pretrained_restores_the_frequencies_by_itself(tmp_path, monkeypatch):
    plain = plain_model()
    plain.save_pretrained(tmp_path)
    load = type(plain).from_pretrained.__func__

    def spoil(cls, *args, **kwargs):
        model, info = load(cls, *args, **kwargs)
        model.model.rotary_emb.bfloat16()
        return model, info

    monkeypatch.setattr(type(plain), "from_pretrained", classmethod(spoil))
    assert_frequencies(Qwen3MoeForCausalLM.from_pretrained(tmp_path), plain)


def test_leaf_classes_are_in_the_model_and_read_no_other_modules_parameters():
    """ZeRO-3 gathers a module's own parameters when it is called: with only those there, a step must still run."""
    ours = ours_like(plain_model(mlp_only_layers=[1]))
    right = copy.deepcopy(ours)
    kinds = {type(module) for module in ours.modules()}
    assert set(ZERO3_LEAF_CLASSES) <= kinds
    real = {parameter: parameter.data for parameter in ours.parameters()}
    ids = tokens(2, 8)

    def gather(module, _):
        for parameter in module.parameters(recurse=isinstance(module, ZERO3_LEAF_CLASSES)):
            parameter.data = real[parameter]

    def release(module, _, __):
        for parameter in module.parameters(recurse=isinstance(module, ZERO3_LEAF_CLASSES)):
            parameter.data = torch.empty(0)

    inside = {each for leaf in ours.modules() if isinstance(leaf, ZERO3_LEAF_CLASSES) for each in leaf.modules()}
    for module in ours.modules():
        if module not in inside or isinstance(module, ZERO3_LEAF_CLASSES):
            release(module, None, None)
            module.register_forward_pre_hook(gather)
            module.register_forward_hook(release)
    with torch.no_grad():
        found, expected = (model(ids, labels=ids, output_aux_loss=True).loss for model in (ours, right))
    assert torch.equal(found, expected)
