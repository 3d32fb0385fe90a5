"""What a layer keeps for its backward, counted in bytes on tensors without data; and what it keeps it for."""

import sys

import pytest
import torch
from tiny_qwen3_moe import ours_like, plain_model, tokens
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen3MoeConfig

from tilestack import Qwen3MoeForCausalLM
from tilestack.kernels import ops
from tilestack.models import KernelChoice, recompute_activations

TOKENS = 4096
QWEN3_30B_A3B = {
    "vocab_size": 256, "hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
    "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": True,
}  # fmt: skip


def saved_kib_per_token(layers: int, monkeypatch) -> float:
    """KiB a token that `layers` layers of Qwen3-30B-A3B, the embedding and the last norm keep, without parameters."""
    for name in KernelChoice.__dataclass_fields__:  # the kernels of a GPU: the references keep other things
        implementation = next(each for each in ops()[name].implementations if each.name == "tilestack-triton")
        monkeypatch.setattr(type(implementation), "refuses_machine", lambda *_: None)
    choice = dict.fromkeys(KernelChoice.__dataclass_fields__, "tilestack-triton")
    storages = {}

    def keep(tensor):
        storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with FakeTensorMode():
        config = Qwen3MoeConfig(**QWEN3_30B_A3B, num_hidden_layers=layers)
        model = Qwen3MoeForCausalLM._from_config(config, dtype=torch.bfloat16, kernels=choice).train()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model.model(torch.zeros(1, TOKENS, dtype=torch.int64), use_cache=False)
    parameters = {each.untyped_storage()._cdata for each in model.parameters()}
    return sum(nbytes for key, nbytes in storages.items() if key not in parameters) / TOKENS / 1024


def test_a_layer_of_qwen3_30b_a3b_keeps_at_most_75_kib_a_token(monkeypatch):
    two, three = (saved_kib_per_token(layers, monkeypatch) for layers in (2, 3))
    assert 60 < three - two <= 75, "transformers keeps 190"


def gradients_of(model) -> dict[str, torch.Tensor]:
    model.zero_grad()
    ids = tokens(2, 12)
    model(ids, labels=ids, output_aux_loss=True).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.fixture
def attention_runs(monkeypatch) -> list:
    """One entry for each time that attention's forward runs."""
    runs = []
    reference = sys.modules["tilestack.kernels.attention.reference"]
    forward = reference.forward
    monkeypatch.setattr(reference, "forward", lambda *args: runs.append(1) or forward(*args))
    return runs


@pytest.mark.parametrize(("mode", "runs_a_layer"), [("none", 1), ("selective", 1), ("full", 2)])
@pytest.mark.parametrize("offload", [False, True])
def test_recomputing_changes_no_bit_and_selective_runs_attention_once(mode, runs_a_layer, offload, attention_runs):
    ours = ours_like(plain_model(mlp_only_layers=[1], num_hidden_layers=3, router_aux_loss_coef=1.0))
    expected = gradients_of(ours)
    if offload and mode == "none":
        with pytest.raises(ValueError, match="take 'selective' or 'full'"):
            recompute_activations(ours, mode, offload=True)
        return
    attention_runs.clear()
    recompute_activations(ours, mode, offload=offload)
    found = gradients_of(ours)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert len(attention_runs) == 3 * runs_a_layer
    recompute_activations(ours, "none")
    assert not any(layer.gradient_checkpointing for layer in ours.model.layers)


def test_offloading_moves_the_inputs_of_the_layers_and_nothing_else(monkeypatch):
    ours = ours_like(plain_model())
    recompute_activations(ours, "selective", offload=True)
    moved = []

    class Recorded(torch.autograd.graph.saved_tensors_hooks):
        def __init__(self, pin_memory):
            super().__init__(lambda tensor: moved.append(tuple(tensor.shape)) or tensor, lambda tensor: tensor)

    monkeypatch.setattr(torch.autograd.graph, "save_on_cpu", Recorded)
    gradients_of(ours)
    assert moved == [(2, 12, 64)] * 2


def test_an_unknown_mode_is_named():
    with pytest.raises(ValueError, match="mode must be one of 'none', 'selective', 'full', got 'some'"):
        recompute_activations(ours_like(plain_model()), "some")


def test_what_a_layer_leaves_to_the_next_norm_changes_no_bit():
    ours = ours_like(plain_model(mlp_only_layers=[1], num_hidden_layers=3, router_aux_loss_coef=1.0))
    left = gradients_of(ours)
    handles = [layer.register_forward_hook(lambda *_: None) for layer in ours.model.layers]
    added = gradients_of(ours)
    assert all(torch.equal(left[name], added[name]) for name in left)
    seen = []
    handles.append(ours.model.layers[0].register_forward_hook(lambda _, __, out: seen.append(out)))
    gradients_of(ours)
    assert isinstance(seen[0], tuple) and seen[0][0].shape == (2, 12, 64), "hidden states and two statistics"
    for handle in handles:
        handle.remove()


class Additions(TorchDispatchMode):
    """Counts additions of tensors of the shape of the hidden states, forward and backward."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        is_sum = function.overloadpacket in (torch.ops.aten.add, torch.ops.aten.add_)
        self.count += is_sum and out.shape[-1:] == (64,) and out.numel() == 2 * 12 * 64
        return out


def test_a_layer_adds_hidden_states_inside_its_kernels_alone():
    """One plain addition is left: the router's and the experts' gradients of the normalised hidden states."""
    counts = []
    for layers in (2, 3):
        ours = ours_like(plain_model(num_hidden_layers=layers))
        with Additions() as additions:
            gradients_of(ours)
        counts.append(additions.count)
    assert counts[1] - counts[0] == 1
