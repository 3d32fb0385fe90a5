"""adamw over many steps, against torch.optim.AdamW, and what it refuses."""

import pytest
import torch

from tilestack.kernels import UnsupportedError, adamw
from tilestack.kernels.adamw.eight_bits import decode, encode, scales_of
from tilestack.kernels.adamw.op import OP, AdamWParams
from tilestack.kernels.adamw.reference import draw
from tilestack.kernels.device import Device

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HYPER = {"lr": 3e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
STEPS = 50
EIGHT_BITS = {name: torch.ones(4, dtype=torch.uint8) for name in ("exp_avg", "exp_avg_sq")} | {
    name: torch.ones(1) for name in ("exp_avg_scale", "exp_avg_sq_scale")
}
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
        ({"exp_avg": torch.ones(4).half()}, "adamw: exp_avg must be torch.float32, got torch.float16"),
        ({"exp_avg": torch.ones(4).bfloat16()}, "adamw: exp_avg_sq must be torch.bfloat16, got torch.float32"),
        (EIGHT_BITS | {"exp_avg_scale": None}, "adamw: exp_avg_scale belongs to moments in torch.uint8"),
        ({"exp_avg_scale": torch.ones(1)}, "no others, the moments are torch.float32"),
        (
            EIGHT_BITS | {"exp_avg_sq_scale": torch.ones(2)},
            r"exp_avg_sq_scale must be \[1\] \(one of each 256 elements",
        ),
        ({"scalars": torch.ones(3)}, r"adamw: scalars must be \[4\]"),
        ({"seed": -1}, "adamw: seed must be at least 0, got -1"),
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


def _in_8_bits(moment, signed, random=None):
    codes, scales = torch.zeros_like(moment, dtype=torch.uint8), moment.new_zeros(scales_of(moment.numel()))
    encode(moment, codes, scales, signed=signed, random=random)
    return codes, scales


@pytest.mark.parametrize("signed", [True, False])
def test_8_bits_hold_every_number_to_a_16th_of_it_and_give_back_what_they_gave(signed):
    moment = torch.logspace(0, -4, 1000, dtype=torch.float32)  # a group of 256 spans one decade
    moment = moment * (-1) ** torch.arange(1000) if signed else moment
    codes, scales = _in_8_bits(moment, signed)
    kept = decode(codes, scales, signed=signed)
    assert ((kept - moment).abs() <= moment.abs() / 16 * (1 + 1e-5)).all()
    again, scales_again = _in_8_bits(kept, signed)
    assert torch.equal(again, codes) and torch.equal(scales_again, scales)


def test_a_second_moment_never_becomes_0_and_a_first_moment_may():
    moment = torch.tensor([1.0, 1e-12, 1e-36, 0.0])
    assert (decode(*_in_8_bits(moment, signed=False), signed=False) > 0).tolist() == [True, True, True, False]
    assert (decode(*_in_8_bits(moment, signed=True), signed=True) > 0).tolist() == [True, False, False, False]


@pytest.mark.parametrize("signed", [True, False])
def test_rounding_to_8_bits_by_chance_is_right_on_average(signed):
    moment = torch.logspace(0, -3, 256)  # all sizes within a group
    kept = []
    for step in range(400):
        random = draw(256, step, 0, torch.device("cpu"))[0 if signed else 1]
        kept.append(decode(*_in_8_bits(moment, signed, random), signed=signed).double())
    kept = torch.stack(kept)
    # six times the standard error of a mean of 400, where a unit is at most an 8th; to nearest, most would be outside
    assert ((kept.mean(0) - moment).abs() <= 6 * (moment / 8 / 2) / 400**0.5).all()
    assert kept.std(0).mean() > 0.01 * moment.mean()


@every_implementation
def test_weights_without_a_master_move_on_average_even_by_less_than_their_unit(implementation):
    # moments in balance: every step is lr, a 16th of the unit of a bfloat16 between 1 and 2
    step, steps, n = 2.0**-11, 24, 4096
    options = HYPER | {"lr": step, "weight_decay": 0.0, "eps": 0.0}
    found = {}
    for seed in (None, 3):
        param = torch.full((n,), 1.5, dtype=torch.bfloat16, device=DEVICE)
        first, second = torch.ones(n, device=DEVICE), torch.ones(n, device=DEVICE)
        for at in range(100_000, 100_000 + steps):
            adamw(
                param, torch.ones_like(param), first, second, step=at, seed=seed, implementation=implementation,
                **options,
            )  # fmt: skip
        found[seed] = param.float()
    assert (found[None] == 1.5).all()
    assert found[3].mean().item() == pytest.approx(1.5 - steps * step, abs=1e-3)
    assert found[3].std() > 0


@every_implementation
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.uint8])
def test_narrow_second_moments_follow_a_gradient_that_fades_at_beta2_0998(dtype, implementation):
    # a step changes them by a 500th: rounded to nearest they would stay where they are
    n, steps = 2048, 100
    generator = torch.Generator().manual_seed(2)
    start = (0.5 + torch.rand(n, generator=generator)).to(DEVICE)
    narrow = {"exp_avg": torch.zeros(n, device=DEVICE).to(dtype), "exp_avg_sq": start.to(torch.bfloat16)}
    if dtype == torch.uint8:
        narrow["exp_avg_scale"] = torch.zeros(scales_of(n), device=DEVICE)
        narrow["exp_avg_sq"], narrow["exp_avg_sq_scale"] = _in_8_bits(start, signed=False)
    param = torch.zeros(n, device=DEVICE)
    for step in range(1, steps + 1):
        options = HYPER | {"beta2": 0.998}
        adamw(param, torch.zeros_like(param), **narrow, step=step, seed=1, implementation=implementation, **options)
    left = narrow["exp_avg_sq"].float()
    if dtype == torch.uint8:
        left = decode(narrow["exp_avg_sq"], narrow["exp_avg_sq_scale"], signed=False)
    assert left.mean().item() == pytest.approx(start.mean().item() * 0.998**steps, rel=0.02)


@every_implementation
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.uint8])
def test_narrow_moments_change_fifty_steps_by_little(dtype, implementation):
    gradients, exact, found = _gradients(), _torch_adamw(_start(), _gradients(), torch.float64), _start()
    moments = {name: torch.zeros_like(found, dtype=dtype) for name in ("exp_avg", "exp_avg_sq")}
    if dtype == torch.uint8:
        moments |= {f"{name}_scale": torch.zeros(scales_of(found.numel()), device=DEVICE) for name in tuple(moments)}
    for step, gradient in enumerate(gradients, start=1):
        adamw(found, gradient, **moments, step=step, seed=0, implementation=implementation, **HYPER)
    moved = (exact - _start()).norm()
    assert (found - exact).norm() < (0.01 if dtype == torch.bfloat16 else 0.15) * moved


def test_the_kernel_and_the_reference_draw_the_same_numbers():
    made = []
    for implementation in ("reference", "tilestack-triton"):
        param = torch.full((5000,), 1.5, dtype=torch.bfloat16, device=DEVICE)
        moments = {name: torch.zeros(5000, dtype=torch.uint8, device=DEVICE) for name in ("exp_avg", "exp_avg_sq")}
        moments |= {f"{name}_scale": torch.zeros(scales_of(5000), device=DEVICE) for name in tuple(moments)}
        gradient = torch.randn(5000, generator=torch.Generator().manual_seed(4)).to(DEVICE, torch.bfloat16)
        for step in range(1, 4):
            adamw(param, gradient, **moments, step=step, seed=9, implementation=implementation, **HYPER)
        made.append((param, moments["exp_avg"], moments["exp_avg_sq"]))
    for theirs, ours in zip(*made, strict=True):
        assert (theirs != ours).float().mean() < 0.002  # where the last bit of a float32 decides


def test_random_numbers_are_even_and_independent_from_step_to_step_and_place_to_place():
    numbers = [torch.stack(draw(1 << 16, step, 0, torch.device("cpu"))).double() for step in (1, 2)]
    for now, later in zip(*numbers, strict=True):
        half = (now.max() + 1) / 2
        assert now.mean().item() == pytest.approx(half.item(), rel=0.02)
        for other in (later, now.roll(1)):
            assert abs(torch.corrcoef(torch.stack([now, other]))[0, 1]) < 0.02
