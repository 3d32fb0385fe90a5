"""layer_norm beyond the shared grid: the reference is torch's own, errors, what backward is asked for."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812  (torch's own habit)

from tilestack.kernels import layer_norm

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


def test_the_reference_is_torchs_own_and_its_gradients_are_right():
    x, residual = random(3, 8), random(3, 8, seed=1)
    weight, bias = random(8, seed=2), random(8, seed=3)
    found = layer_norm(x, weight, bias, residual=residual, eps=1e-3)
    torch.testing.assert_close(found.out, F.layer_norm(x + residual, (8,), weight, bias, 1e-3))
    torch.testing.assert_close(found.residual_out, x + residual)
    found = layer_norm(x, weight, is_rms_norm=True, eps=1e-3)
    torch.testing.assert_close(found.out, F.rms_norm(x, (8,), weight, 1e-3))
    assert found.residual_out is x and found.out1 is None and found.dropout_mask is None
    seed = torch.tensor([1, 2])

    def run(x, weight, bias, residual, x1):
        found = layer_norm(x, weight, bias, residual=residual, x1=x1, dropout_p=0.4, dropout_seed=seed)
        return found.out, found.residual_out

    assert torch.autograd.gradcheck(run, (x, weight, bias, residual, random(3, 8, seed=4)))


@pytest.mark.parametrize("implementation", ["tilestack-triton", "reference"])
@pytest.mark.parametrize("wanted", [("x",), ("residual",), ("weight1",), ("bias", "x1"), ("x", "residual", "bias1")])
def test_each_gradient_may_be_asked_for_alone(wanted, implementation):
    names = ("x", "weight", "bias", "residual", "x1", "weight1", "bias1")
    whole = {name: random(*((3, 16) if name in ("x", "residual", "x1") else (16,)), seed=index).detach().float()
             for index, name in enumerate(names)}  # fmt: skip

    def gradients(needed):
        leaves = {name: each.to(DEVICE).clone().requires_grad_(name in needed) for name, each in whole.items()}
        found = layer_norm(**leaves, implementation=implementation)
        return torch.autograd.grad((found.out1.square().sum(), found.residual_out.sum()), [leaves[n] for n in wanted])

    for pair in zip(gradients(wanted), gradients(names), strict=True):
        assert torch.equal(*pair)


BAD = {
    "x must be floating point, got torch.int32": {"x": torch.ones(2, 4).int()},
    r"x must be \[..., H\], H at least 1, got \[3, 0\]": {"x": torch.ones(3, 0)},
    r"weight must be \[4\].*got \[5\]": {"weight": torch.ones(5)},
    r"bias1 belongs to weight1": {"bias1": torch.ones(4)},
    r"residual must be \[2, 4\] \(the shape of x\), got \[4\]": {"residual": torch.ones(4)},
    r"x1 must have the dtype of x \(torch.float32\), got torch.float16": {"x1": torch.ones(2, 4).half()},
    "residual must have the device of x": {"residual": torch.ones(2, 4, device="meta")},
    r"rowscale must be \[2\] \(one for each row of x\), got \[4\]": {"rowscale": torch.ones(4)},
    "rowscale must be None where there is x1": {"rowscale": torch.ones(2), "x1": torch.ones(2, 4)},
    "eps must be at least 0, got -1.0": {"eps": -1.0},
    "dropout_p must be at least 0 and less than 1, got 1.0": {"dropout_p": 1.0},
}


@pytest.mark.parametrize("message", BAD)
def test_wrong_input_gets_one_clear_error(message):
    arguments = {"x": torch.ones(2, 4), "weight": torch.ones(4)} | BAD[message]
    with pytest.raises(ValueError, match=f"^layer_norm: {message}"):
        layer_norm(**arguments)


def test_the_triton_kernels_say_how_wide_a_row_may_be():
    with pytest.raises(ValueError, match="up to H = 16384, got 16385"):
        wide = torch.ones(1, 16385, device=DEVICE)
        layer_norm(wide, wide[0], implementation="tilestack-triton")
