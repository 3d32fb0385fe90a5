"""adamw over many steps, against torch.optim.AdamW, and what it refuses."""

import pytest
import torch

from tilestack.kernels import UnsupportedError, adamw
from tilestack.kernels.adamw.op import OP, AdamWParams
from tilestack.kernels.device import Device

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HYPER = {"lr": 3e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
STEPS = 50
every_implementation = pytest.mark.parametrize("implementation", [each.name for each in OP.implementations])


@pytest.fixture(autouse=True)
def _runs_here(request):
    if "implementation" in request.fixturenames:
        name = request.getfixturevalue("implementation")
        reason = next(each for each in OP.implementations if each.name == name).refuses_machine(Device.of(DEVICE))
        if reason:
            pytest.skip(reason)


def _gradients(shape=(7, 33)):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator).to(DEVICE) for _ in range(STEPS)]


def _start(shape=(7, 33)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)


def _torch_adamw(weights, gradients, dtype):
    weights = weights.to(dtype).clone().requires_grad_()
    optimizer = torch.optim.AdamW(
        [weights], lr=HYPER["lr"], betas=(HYPER["beta1"], HYPER["beta2"]), eps=HYPER["eps"],
        weight_decay=HYPER["weight_decay"], foreach=False,
    )  # fmt: skip
    for gradient in gradients:
        weights.grad = gradient.to(dtype)
        optimizer.step()
    return weights.detach()


def _ours(param, gradients, implementation, master=None, **overrides):
    exp_avg, exp_avg_sq = torch.zeros_like(param, dtype=torch.float32), torch.zeros_like(param, dtype=torch.float32)
    for step, gradient in enumerate(gradients, start=1):
        adamw(
            param, gradient, exp_avg, exp_avg_sq, master=master, step=step, implementation=implementation,
            **(HYPER | overrides),
        )  # fmt: skip


@every_implementation
def test_scalars_on_the_device_give_the_step_that_they_were_made_of(implementation):
    params = AdamWParams(step=9, **HYPER)
    start, gradient = _start(), _gradients()[0]
    found = []
    for scalars, step, lr in ((None, 9, HYPER["lr"]), (torch.tensor(params.scalars(), device=DEVICE), 1, 0.5)):
        param, master, moment, square = start.bfloat16(), start.clone(), 0.1 * start, (0.1 * start).square()
        options = HYPER | {"step": step, "lr": lr}
        adamw(param, gradient, moment, square, master=master, scalars=scalars, implementation=implementation, **options)
        found.append(master)
    torch.testing.assert_close(*found, rtol=1e-6, atol=0)
    if implementation == "tilestack-triton":
        assert torch.equal(*found)


@every_implementation
def test_fifty_steps_in_float32_are_as_close_to_float64_as_torchs(implementation):
    exact = _torch_adamw(_start(), _gradients(), torch.float64)
    theirs = _torch_adamw(_start(), _gradients(), torch.float32)
    ours = _start()
    _ours(ours, _gradients(), implementation)
    # the rule of testing.compare: twice torch's own error, and one unit of the largest weight
    budget = 2 * (theirs - exact).abs().max() + torch.finfo(torch.float32).eps * exact.abs().max()
    assert (ours - exact).abs().max() <= budget
    assert (ours - _start()).abs().max() > 0.05, "the weights hardly moved, so the test says nothing"


@every_implementation
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_float32_master_follows_float32_adamw_and_the_parameter_is_its_rounding(dtype, implementation):
    gradients = [each.to(dtype) for each in _gradients()]
    theirs = _torch_adamw(_start(), [each.float() for each in gradients], torch.float32)
    exact = _torch_adamw(_start(), [each.double() for each in gradients], torch.float64)
    param, master = _start().to(dtype), _start()
    _ours(param, gradients, implementation, master=master)
    budget = 2 * (theirs - exact).abs().max() + torch.finfo(torch.float32).eps * exact.abs().max()
    assert (master - exact).abs().max() <= budget
    assert torch.equal(param, master.to(dtype))


@every_implementation
def test_with_a_master_the_parameters_old_value_does_not_matter(implementation):
    master = _start()
    param = torch.full_like(master, float("nan"), dtype=torch.bfloat16)
    _ours(param, _gradients()[:1], implementation, master=master)
    assert torch.equal(param, master.bfloat16())


@every_implementation
def test_a_step_that_is_scaled_down_equals_a_step_with_the_scaled_gradient(implementation):
    scaled, expected = _start(), _start()
    scale = torch.tensor(0.3, device=DEVICE)  # no power of two: the product is rounded
    _ours(scaled, _gradients()[:3], implementation, grad_scale=scale)
    _ours(expected, [scale * each for each in _gradients()[:3]], implementation)
    assert torch.equal(scaled, expected)


@every_implementation
def test_a_scale_of_nan_leaves_everything_as_it_was(implementation):
    param = _start()
    _ours(param, _gradients()[:3], implementation, grad_scale=torch.tensor(float("nan"), device=DEVICE))
    assert torch.equal(param, _start())


@every_implementation
def test_a_parameter_in_training_is_updated_and_autograd_sees_the_write(implementation):
    weights = _start().requires_grad_()
    before = weights._version
    _ours(weights, _gradients()[:1], implementation)
    assert weights.requires_grad and weights.is_leaf and not torch.equal(weights.detach(), _start())
    assert weights._version > before


@pytest.mark.parametrize("late", [1000, 100_000])
@every_implementation
def test_late_steps_do_without_a_correction(late, implementation):
    param, exp_avg, exp_avg_sq = _start(), torch.full_like(_start(), 0.5), torch.full_like(_start(), 0.25)
    adamw(
        param, torch.full_like(param, 0.5), exp_avg, exp_avg_sq, step=late, implementation=implementation,
        **(HYPER | {"weight_decay": 0.0}),
    )  # fmt: skip
    torch.testing.assert_close(param, _start() - HYPER["lr"], rtol=0, atol=1e-6)  # moments in balance: m / sqrt(v) = 1


def test_the_triton_kernel_refuses_a_transposed_parameter_and_says_which_strides():
    param = _start().T
    with pytest.raises(UnsupportedError, match=r"contiguous tensors, param has shape \[33, 7\] and strides \[1, 33\]"):
        _ours(param, [torch.ones_like(param)], "tilestack-triton")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": 0}, "adamw: step must be at least 1, got 0"),
        ({"lr": -1.0}, "adamw: lr must be at least 0, got -1.0"),
        ({"eps": -1.0}, "adamw: eps must be at least 0, got -1.0"),
        ({"weight_decay": -0.5}, "adamw: weight_decay must be at least 0, got -0.5"),
        ({"beta1": 1.0}, "adamw: beta1 must be at least 0 and less than 1, got 1.0"),
        ({"beta2": -0.1}, "adamw: beta2 must be at least 0 and less than 1, got -0.1"),
        ({"grad": torch.ones(3)}, r"adamw: grad must be \[4\] \(the shape of param\), got \[3\]"),
        ({"grad": torch.ones(4, dtype=torch.int32)}, "adamw: grad must be floating point, got torch.int32"),
        ({"exp_avg": torch.ones(4).bfloat16()}, "adamw: exp_avg must be torch.float32, got torch.bfloat16"),
        ({"exp_avg_sq": torch.ones(4, 1)}, r"adamw: exp_avg_sq must be \[4\]"),
        ({"master": torch.ones(4).bfloat16()}, "adamw: master must be torch.float32, got torch.bfloat16"),
        ({"grad_scale": torch.ones(2)}, r"adamw: grad_scale must be one number, got \[2\]"),
        ({"grad": torch.ones(4, device="meta")}, "adamw: grad must have the device of param"),
    ],
)
def test_wrong_input_gets_one_clear_error_and_changes_nothing(change, message):
    tensors = {name: torch.ones(4) for name in ("param", "grad", "exp_avg", "exp_avg_sq")}
    arguments = tensors | {"step": 1} | HYPER | change
    with pytest.raises(ValueError, match=message):
        adamw(**arguments)
    assert all(torch.equal(tensor, torch.ones(4)) for tensor in tensors.values())
