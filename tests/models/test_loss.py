"""The parts of the loss: fused cross entropy, load-balancing loss, their scaling, and activation checkpointing."""

import copy
import inspect

import pytest
import torch
from tiny_qwen3_moe import (
    VOCABULARY,
    Plain,
    Qwen3MoeForCausalLM,
    assert_same,
    ours_like,
    plain_model,
    tiny_config,
    tokens,
)
from transformers import Qwen3MoeForSequenceClassification
from transformers.utils.generic import find_labels

from tilestack import enable


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def test_logits_are_there_only_when_asked_for():
    ours = ours_like(plain_model())
    ids = tokens(2, 8)
    assert ours(ids).logits.shape == (2, 8, VOCABULARY)
    assert ours(ids, labels=ids).logits is None
    assert ours(ids, labels=ids, return_logits=True).logits.shape == (2, 8, VOCABULARY)
    assert ours(ids, labels=ids, logits_to_keep=1).logits.shape == (2, 1, VOCABULARY)
    assert ours(ids, logits_to_keep=3).logits.shape == (2, 3, VOCABULARY)
    assert ours(ids, return_logits=False).logits is None


def test_no_cache_is_kept_beside_labels_unless_asked_for():
    ours = ours_like(plain_model())
    ids = tokens(1, 8)
    assert ours(ids, labels=ids).past_key_values is None
    assert ours(ids, labels=ids, use_cache=True).past_key_values.get_seq_length() == 8
    assert ours(ids).past_key_values.get_seq_length() == 8


def test_a_loss_function_of_the_users_own_is_called():
    ours = ours_like(plain_model())
    ids = tokens(1, 8)
    ours.loss_function = lambda logits, labels, vocab_size, **kwargs: logits.square().mean()
    outputs = ours(ids, labels=ids, return_logits=True)
    torch.testing.assert_close(outputs.loss, outputs.logits.square().mean())


def test_router_logits_are_those_of_transformers():
    plain = plain_model(mlp_only_layers=[1], num_hidden_layers=3)
    ours = ours_like(plain)
    ids = tokens(2, 8)
    right, found = plain(ids, output_router_logits=True), ours(ids, output_router_logits=True)
    assert len(found.router_logits) == len(right.router_logits) == 2
    for one, other in zip(found.router_logits, right.router_logits, strict=True):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(found.aux_loss, right.aux_loss)


def test_router_logits_can_be_left_out_and_the_loss_is_the_same():
    ours = ours_like(plain_model())
    ids = tokens(2, 8)
    with_logits, without = ours(ids, labels=ids, output_router_logits=True), ours(ids, labels=ids, output_aux_loss=True)
    assert torch.equal(with_logits.loss, without.loss)
    assert without.router_logits is None
    assert ours(ids, labels=ids).aux_loss is None


def test_the_configuration_can_ask_for_router_logits():
    plain = plain_model(output_router_logits=True, router_aux_loss_coef=0.5)
    ids = tokens(2, 8)
    assert_same(ours_like(plain), plain, {"input_ids": ids, "labels": ids})


def test_expert_load_counts_the_routes_of_the_tokens_that_count():
    ours = ours_like(plain_model())
    ids, mask = tokens(2, 8), torch.ones(2, 8, dtype=torch.long)
    mask[0, :3] = 0
    load = ours(ids, attention_mask=mask, labels=ids, output_aux_loss=True).tokens_per_expert
    assert load.shape == (2, 8)
    assert not load.requires_grad
    assert load.sum(-1).tolist() == [13 * 2, 13 * 2]


def test_trainer_finds_one_label_and_a_forward_that_divides_the_loss():
    assert find_labels(Qwen3MoeForCausalLM) == find_labels(Plain) == ["labels"]
    arguments = inspect.signature(Qwen3MoeForCausalLM.forward).parameters.values()
    assert any(argument.kind is argument.VAR_KEYWORD for argument in arguments)


def test_hidden_states_are_those_of_transformers():
    plain = plain_model()
    ids = tokens(2, 8)
    for extra in ({}, {"output_router_logits": True}):
        right = plain(ids, output_hidden_states=True, **extra).hidden_states
        found = ours_like(plain)(ids, output_hidden_states=True, **extra).hidden_states
        assert len(found) == len(right) == 3
        for one, other in zip(found, right, strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("reentrant", [True, False])
def test_load_balancing_loss_survives_activation_checkpointing(reentrant):
    plain = plain_model(router_aux_loss_coef=1.0)
    ids = tokens(2, 12)
    inputs = {"input_ids": ids, "labels": ids, "output_router_logits": True}
    ours = ours_like(plain)
    ours.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert ours.is_gradient_checkpointing
    assert_same(ours, plain, inputs)


def test_accumulated_micro_batches_give_the_mean_of_transformers_values():
    """Two micro-batches: ce_sum / all items, plus the coefficient times the mean of the load-balancing losses."""
    plain = plain_model(router_aux_loss_coef=1.0)
    micro = [tokens(2, 6, seed=2), tokens(1, 9, seed=3)]
    items = sum(ids.numel() - len(ids) for ids in micro)
    right = 0.0
    for ids in micro:
        outputs = plain(ids, labels=ids, output_router_logits=True)
        ce = outputs.loss - outputs.aux_loss
        right = right + ce * (ids.numel() - len(ids)) / items + outputs.aux_loss / len(micro)
    right.backward()

    ours = ours_like(plain)
    losses = []
    for ids in micro:
        outputs = ours(ids, labels=ids, output_aux_loss=True, num_items_in_batch=items, aux_loss_divisor=len(micro))
        assert torch.equal(outputs.loss, outputs.ce_loss + outputs.aux_loss / 2)
        outputs.loss.backward()
        losses.append(outputs.loss.detach())
    torch.testing.assert_close(sum(losses), right.detach())
    for name, gradient in gradients(plain).items():
        torch.testing.assert_close(gradients(ours)[name], gradient, msg=lambda text, name=name: f"{name}: {text}")


def test_bf16_autocast_over_float32_weights_works():
    plain = plain_model(mlp_only_layers=[1])
    ids = tokens(2, 12)
    exact = plain(ids, labels=ids).loss
    losses = {}
    for name, model in {"transformers": plain, "ours": ours_like(plain)}.items():
        with torch.autocast("cpu", torch.bfloat16):
            losses[name] = model(ids, labels=ids, output_router_logits=True)
        losses[name].loss.backward()
        assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())
        losses[name] = (losses[name].loss - 0.001 * losses[name].aux_loss).detach()
    unit = torch.finfo(torch.bfloat16).eps
    assert abs(losses["ours"] - exact) <= 2 * abs(losses["transformers"] - exact) + unit * exact


def test_bf16_weights_are_as_close_as_transformers():
    plain = plain_model(mlp_only_layers=[1]).bfloat16()
    exact = copy.deepcopy(plain).float()
    ids = tokens(2, 12)
    right = exact(ids).logits
    theirs = (plain(ids).logits.float() - right).square().mean().sqrt()
    ours = (ours_like(plain)(ids).logits.float() - right).square().mean().sqrt()
    assert ours <= 2 * theirs


def test_a_backbone_with_another_head_can_be_enabled():
    torch.manual_seed(0)
    plain = Qwen3MoeForSequenceClassification(tiny_config(num_labels=3))
    enabled = copy.deepcopy(plain)
    enable(enabled)
    ids = tokens(2, 8)
    torch.testing.assert_close(enabled(ids).logits, plain(ids).logits)


def test_the_heads_gradient_is_added_in_place_only_where_nothing_hooks_its_weight():
    ours = ours_like(plain_model())
    ids = tokens(2, 8)
    weight = ours.lm_head.weight
    ours(ids, labels=ids).loss.backward()
    expected, weight.grad = weight.grad, None
    weight.gradient_sum = torch.ones_like(weight)
    ours(ids, labels=ids).loss.backward()
    assert weight.grad is None
    torch.testing.assert_close(weight.gradient_sum, 1 + expected)
    hook = weight.register_hook(lambda gradient: gradient)
    ours(ids, labels=ids).loss.backward()
    assert torch.equal(weight.grad, expected)
    torch.testing.assert_close(weight.gradient_sum, 1 + expected)
    hook.remove()
