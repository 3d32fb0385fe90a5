"""ops.triton.layer_norm: what is returned, in which order, and that it is what flash-attn's own reference computes."""

import pytest
import torch
from naive_attention import DEVICE, random

from tilestack.compat.flash_attn.ops.triton.layer_norm import (
    RMSNorm,
    layer_norm_fn,
    layer_norm_linear_fn,
    layer_norm_ref,
    rms_norm_fn,
    rms_norm_ref,
)

SHAPE = (3, 7, 40)
FUNCTIONS = {"layer norm": (layer_norm_fn, layer_norm_ref), "rms norm": (rms_norm_fn, rms_norm_ref)}


def make(*names, dtype=torch.float32):
    sizes = {name: SHAPE if name in ("x", "residual", "x1") else SHAPE[:-1] if name == "rowscale" else SHAPE[-1:]
             for name in names}  # fmt: skip
    return {name: random(*size, dtype=dtype, seed=index) for index, (name, size) in enumerate(sizes.items())}


def agree(ours, plain, tensors, kept=lambda found: found):
    """Both give the same outputs and gradients, in float32 up to rounding."""
    found, expected = (each if isinstance(each, tuple) else (each,) for each in (ours, plain))
    found = kept(found)
    wanted = [each for name, each in tensors.items() if name != "rowscale"]
    assert len(found) == len(expected)
    for pair in zip(found, expected, strict=True):
        torch.testing.assert_close(*pair)
    upstream = [random(*each.shape, dtype=each.dtype, seed=20 + index).detach() for index, each in enumerate(found)]
    gradients = [torch.autograd.grad(each, wanted, upstream, allow_unused=True) for each in (found, expected)]
    for pair in zip(*gradients, strict=True):
        torch.testing.assert_close(*pair)


CALLS = {
    "bare": (("x", "weight", "bias"), {}),
    "residual": (("x", "weight", "bias", "residual"), {"prenorm": True}),
    "no bias": (("x", "weight"), {"prenorm": True}),
    "row scale": (("x", "weight", "bias", "residual", "rowscale"), {"prenorm": True}),
    "parallel": (("x", "weight", "bias", "residual", "x1", "weight1", "bias1"), {"prenorm": True}),
    "two weights": (("x", "weight", "bias", "weight1", "bias1"), {}),
    "centred": (("x", "weight", "weight1"), {"zero_centered_weight": True, "eps": 1e-2}),
}


@pytest.mark.parametrize("kind", FUNCTIONS)
@pytest.mark.parametrize("name", CALLS)
def test_it_is_what_the_reference_of_flash_attn_computes(name, kind):
    names, options = CALLS[name]
    function, reference = FUNCTIONS[kind]
    tensors = make(*names)
    given = {"bias": None} | tensors
    agree(function(**given, **options), reference(**given, **options), tensors)


@pytest.mark.parametrize("parallel", [False, True])
def test_dropout_gives_its_masks_and_drops_the_same_in_backward(parallel):
    names = ("x", "weight", "bias", "residual", *(("x1", "weight1", "bias1") if parallel else ("rowscale",)))
    tensors = make(*names)
    torch.manual_seed(5)
    ours = layer_norm_fn(**tensors, dropout_p=0.3, prenorm=True, return_dropout_mask=True)
    *results, mask, mask1 = ours
    assert mask.dtype == torch.bool and mask.shape == SHAPE and 0.6 < mask.float().mean() < 0.8
    assert (mask1 is not None) == parallel and not (parallel and torch.equal(mask, mask1))
    plain = layer_norm_ref(**tensors, dropout_p=0.3, prenorm=True, dropout_mask=mask, dropout_mask1=mask1)
    agree(tuple(results), plain, tensors)
    torch.manual_seed(5)
    assert torch.equal(layer_norm_fn(**tensors, dropout_p=0.3, prenorm=True)[-1], results[-1])


def test_the_sum_has_the_dtype_that_is_asked_for():
    tensors = make("x", "weight", "bias", dtype=torch.bfloat16)
    out, summed = layer_norm_fn(**tensors, prenorm=True, residual_in_fp32=True)
    assert (out.dtype, summed.dtype) == (torch.bfloat16, torch.float32)
    out, summed = layer_norm_fn(**tensors, residual=summed, prenorm=True, out_dtype=torch.float32)
    assert (out.dtype, summed.dtype) == (torch.float32, torch.float32)
    out, summed = layer_norm_fn(**tensors, prenorm=True)
    assert summed is tensors["x"]  # nothing was added
    masks = layer_norm_fn(**tensors, return_dropout_mask=True)[1:]
    assert masks == (None, None)  # nothing was dropped


def test_results_go_to_given_tensors():
    tensors = make("x", "weight", "bias", "residual")
    out, summed = (torch.empty(SHAPE, device=DEVICE) for _ in range(2))
    with torch.no_grad():
        found = layer_norm_fn(**tensors, prenorm=True, out=out, residual_out=summed)
        expected = layer_norm_fn(**tensors, prenorm=True)
    assert found[0] is out and found[1] is summed
    assert torch.equal(out, expected[0]) and torch.equal(summed, expected[1])


def test_the_layer_is_rms_norm_fn_with_a_weight_and_dropout_in_training_alone():
    x, residual = make("x", "residual").values()
    layer = RMSNorm(SHAPE[-1], dropout_p=0.5, device=DEVICE, dtype=torch.float32)
    assert layer.bias is None and (layer.weight == 1).all()
    assert (RMSNorm(4, zero_centered_weight=True).weight == 0).all()
    layer.eval()
    out, summed = layer(x, residual, prenorm=True)
    torch.testing.assert_close((out, summed), rms_norm_ref(x, layer.weight, None, residual, eps=1e-5, prenorm=True))
    layer.train()
    torch.manual_seed(1)
    dropped = layer(x, residual)
    torch.manual_seed(1)
    assert torch.equal(dropped, rms_norm_fn(x, layer.weight, None, residual, eps=1e-5, dropout_p=0.5))


@pytest.mark.parametrize("is_rms_norm", [False, True])
def test_a_linear_layer_behind_it_is_right(is_rms_norm):
    tensors = make("x", "weight", "bias", "residual")
    linear = {"linear_weight": random(12, SHAPE[-1], dtype=torch.float32, seed=8),
              "linear_bias": random(12, dtype=torch.float32, seed=9)}  # fmt: skip
    out, summed = layer_norm_linear_fn(
        tensors["x"], tensors["weight"], tensors["bias"], *linear.values(), tensors["residual"], prenorm=True,
        is_rms_norm=is_rms_norm,
    )  # fmt: skip
    plain, total = (rms_norm_ref if is_rms_norm else layer_norm_ref)(**tensors, prenorm=True)
    agree((out, summed), (torch.nn.functional.linear(plain, *linear.values()), total), tensors | linear)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        out = layer_norm_linear_fn(tensors["x"], tensors["weight"], tensors["bias"], *linear.values())
    assert out.dtype == torch.bfloat16


def test_it_compiles_into_one_graph():
    tensors = make("x", "weight", "bias", "residual")
    compiled = torch.compile(layer_norm_fn, fullgraph=True, backend="aot_eager")
    found, expected = (each(**tensors, prenorm=True) for each in (compiled, layer_norm_fn))
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
