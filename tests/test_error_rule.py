"""The error rule of tilestack.testing.compare can fail: planted mistakes are caught, an honest result passes."""

import pytest
import torch

from tilestack.testing.compare import Case, OpCases, assert_close, check

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class _Product(torch.autograd.Function):
    """x * weight, with a mistake planted in the output or in a gradient."""

    @staticmethod
    def forward(ctx, x, weight, in_out, in_dx):
        ctx.save_for_backward(x, weight)
        ctx.in_dx = in_dx
        return in_out(x * weight)

    @staticmethod
    def backward(ctx, dout):
        x, weight = ctx.saved_tensors
        return ctx.in_dx(dout * weight), (dout * x).sum(0), None, None


def _right(tensor):
    return tensor


def _op(in_out=_right, in_dx=_right) -> OpCases:
    def call(tensors, arguments, implementation):
        if implementation == "reference":
            return {"out": tensors["x"] * tensors["weight"]}
        return {"out": _Product.apply(tensors["x"], tensors["weight"], in_out, in_dx)}

    return OpCases("product", call, differentiable=("x", "weight"), cases=())


def _make(dtype, device, generator):
    x, weight = torch.randn(64, 48, generator=generator), torch.randn(48, generator=generator)
    return {"x": x.to(device, dtype), "weight": weight.to(device, dtype)}


def _check(op: OpCases, dtype: torch.dtype = torch.float32) -> dict:
    return check(op, Case("planted", "a mistake to be found", _make), "planted", dtype, torch.device("cpu"))


def _wrong_scale(tensor):
    return (tensor.double() * 1.01).to(tensor.dtype)


def _one_element_never_written(tensor):
    out = tensor.new_empty(tensor.shape)
    out.view(-1)[:-1] = tensor.view(-1)[:-1]
    return out


def _one_nan(tensor):
    return tensor.index_fill(0, torch.tensor([3]), float("nan"))


def _one_infinity(tensor):
    return tensor.index_fill(0, torch.tensor([3]), float("inf"))


def _one_wrong_element(tensor):
    out = tensor.clone()
    out[0, 0] += 0.2
    return out


def _two_rows_swapped(tensor):
    return tensor[[1, 0, *range(2, tensor.shape[0])]]


MISTAKES = [
    _wrong_scale, _one_element_never_written, _one_nan, _one_infinity, _one_wrong_element, _two_rows_swapped
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_honest_result_passes_and_its_errors_are_reported(dtype):
    errors = _check(_op(), dtype)
    assert errors.keys() == {"out", "dx", "dweight"}
    assert 0 < errors["out"][0] == errors["out"][1]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_an_output_is_caught(mistake, dtype):
    with pytest.raises(AssertionError, match="^out: "):
        _check(_op(in_out=mistake), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_a_gradient_is_caught(mistake, dtype):
    with pytest.raises(AssertionError, match="^dx: "):
        _check(_op(in_dx=mistake), dtype)


def test_a_result_computed_in_a_narrower_dtype_is_caught():
    with pytest.raises(AssertionError, match="^out: .*over the budget"):
        _check(_op(in_out=lambda tensor: tensor.bfloat16().to(tensor.dtype)))


def test_a_wrong_dtype_is_caught():
    with pytest.raises(AssertionError, match=r"^out: dtype torch.float32, expected torch.bfloat16"):
        _check(_op(in_out=lambda tensor: tensor.float()), torch.bfloat16)


def test_a_wrong_shape_is_caught():
    with pytest.raises(AssertionError, match=r"^out: shape \[3072\], expected \[64, 48\]"):
        assert_close("out", torch.ones(3072), torch.ones(64, 48), torch.ones(64, 48))


def test_an_output_that_is_missing_is_caught():
    op = _op()
    whole = op.call

    def without_out(tensors, arguments, implementation):
        outputs = whole(tensors, arguments, implementation)
        return outputs if implementation == "reference" else {"other": outputs["out"]}

    with pytest.raises(AssertionError):
        _check(OpCases("product", without_out, op.differentiable, ()))


def test_integers_must_be_equal():
    def call(tensors, arguments, implementation):
        order = tensors["x"].sum(1).argsort().int()
        return {"order": order if implementation == "reference" else order.roll(1)}

    with pytest.raises(AssertionError, match="^order: integers differ"):
        _check(OpCases("order", call, differentiable=(), cases=()))


def _few_numbers(change):
    """An op with an output of two numbers; the implementation's differ by `change` of the tensors."""

    def call(tensors, arguments, implementation):
        out = tensors["x"].mean(0)[:2]
        return {"out": out if implementation == "reference" else change(out, tensors["x"])}

    return OpCases("mean", call, differentiable=(), cases=())


def test_bad_luck_with_a_few_numbers_is_judged_over_many_draws():
    unlucky = _make(torch.float32, torch.device("cpu"), torch.Generator().manual_seed(0))["x"][0, 0]

    def far_off_once(out, x):
        return out + 1e-5 * (x[0, 0] == unlucky)

    def somewhat_off_each_time(out, x):
        return out + 1e-5

    unit = torch.finfo(torch.float32).eps
    with pytest.raises(AssertionError, match="over the budget"):
        _check(_few_numbers(somewhat_off_each_time))
    with pytest.raises(AssertionError, match="largest error"):  # once is still too often, if it is by far
        _check(_few_numbers(far_off_once))
    assert _check(_few_numbers(lambda out, x: out + 2 * unit * out.abs().amax() * (x[0, 0] == unlucky)))


def test_many_numbers_get_no_second_draw():
    draws = []

    def make(dtype, device, generator):
        draws.append(generator.initial_seed())
        return _make(dtype, device, generator)

    with pytest.raises(AssertionError, match="out"):
        check(_op(_wrong_scale), Case("planted", "", make), "planted", torch.float32, torch.device("cpu"))
    assert draws == [0]
