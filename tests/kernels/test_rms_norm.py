"""rms_norm: the reference is transformers', bit for bit; refusals."""

import pytest
import torch

from tilestack.kernels import rms_norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_reference_has_the_bits_of_transformers(dtype):
    modeling = pytest.importorskip("transformers.models.qwen3_moe.modeling_qwen3_moe")
    x, residual = torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(0)).to(dtype)
    norm = modeling.Qwen3MoeRMSNorm(48, eps=1e-6).to(dtype)
    torch.nn.init.normal_(norm.weight, generator=torch.Generator().manual_seed(1))
    assert torch.equal(rms_norm(x, norm.weight, eps=1e-6), norm(x))
    out, residual_out = rms_norm(x, norm.weight, residual=residual, eps=1e-6)
    assert torch.equal(residual_out, x + residual)
    assert torch.equal(out, norm(x + residual))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(2, 4).int()}, "x must be floating point, got torch.int32"),
        ({"x": torch.tensor(1.0)}, r"x must be \[..., H\], H at least 1, got \[\]"),
        ({"x": torch.ones(3, 0)}, r"x must be \[..., H\], H at least 1, got \[3, 0\]"),
        ({"weight": torch.ones(5)}, r"weight must be \[4\].*got \[5\]"),
        ({"weight": torch.ones(4).half()}, r"weight must have the dtype of x \(torch.float32\), got torch.float16"),
        ({"residual": torch.ones(4)}, r"residual must be \[2, 4\] \(the shape of x\), got \[4\]"),
        ({"residual": torch.ones(2, 4, device="meta")}, "residual must have the device of x"),
        ({"eps": -1.0}, "eps must be at least 0, got -1.0"),
    ],
)
def test_wrong_input_gets_one_clear_error(change, message):
    arguments = {"x": torch.ones(2, 4), "weight": torch.ones(4)} | change
    with pytest.raises(ValueError, match=f"rms_norm: {message}"):
        rms_norm(**arguments)


@pytest.mark.parametrize("wanted", [("x",), ("residual",), ("weight",), ("residual", "weight"), ("x", "residual")])
def test_a_gradient_does_not_depend_on_which_others_are_wanted(wanted):
    def gradients(*names):
        generator = torch.Generator().manual_seed(0)
        shapes = {"x": (3, 8), "residual": (3, 8), "weight": (8,)}
        tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        leaves = [tensors[name].requires_grad_() for name in names]
        out, residual_out = rms_norm(**tensors)
        return dict(zip(names, torch.autograd.grad((out * residual_out).sum(), leaves), strict=True))

    everything = gradients("x", "residual", "weight")
    for name, gradient in gradients(*wanted).items():
        assert torch.equal(gradient, everything[name])
        assert gradient.abs().max() > 0


def test_a_weight_that_an_output_does_not_depend_on_gets_a_gradient_of_zero():
    x, weight = torch.ones(2, 4), torch.ones(4, requires_grad=True)
    _, residual_out = rms_norm(x, weight, residual=x)
    residual_out.sum().backward()
    assert torch.equal(weight.grad, torch.zeros(4))
