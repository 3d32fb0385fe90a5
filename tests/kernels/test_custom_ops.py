"""Every implementation as a torch custom op: its registration, torch.compile, and the same bits twice.

One test over all ops: a new op or implementation is covered by its cases in tilestack/testing/cases.
"""

import dataclasses

import pytest
import torch
from torch.overrides import TorchFunctionMode

from tilestack.kernels import UnsupportedError, ops
from tilestack.kernels.device import Device
from tilestack.testing.cases import all_cases
from tilestack.testing.compare import evaluate

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
N_CASES = 2  # small ones, of each op: the grid has the others


def _small_cases():
    for op_name, op in all_cases().items():
        for implementation in ops()[op_name].implementations:
            for case in [each for each in op.cases if not each.gpu_only][:N_CASES]:
                name = f"{op_name}-{implementation.name}-{case.name}".replace(" ", "_")
                yield pytest.param(op, implementation, case, id=name)


every_implementation = pytest.mark.parametrize(("op", "implementation", "case"), list(_small_cases()))


def _dtype(op):
    """bf16 on a GPU, where vendors' kernels take nothing wider; the op's first on a CPU."""
    return torch.bfloat16 if DEVICE.type == "cuda" and torch.bfloat16 in op.dtypes else op.dtypes[0]


def _tensors(op, implementation, case):
    """The tensors of the case; skips what this machine cannot run, or what the implementation says it refuses."""
    machine = implementation.refuses_machine(Device.of(DEVICE))
    if machine:
        pytest.skip(machine)
    tensors = case.make(_dtype(op), DEVICE, torch.Generator().manual_seed(0))
    try:
        op.call(tensors, case.arguments, implementation.name)
    except UnsupportedError as refusal:
        pytest.skip(str(refusal))
    return tensors


class _RecordCustomOps(TorchFunctionMode):
    """Notes every call of a custom op of ours."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if isinstance(func, torch._ops.OpOverload) and func.namespace == "tilestack":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


@every_implementation
def test_the_custom_ops_of_an_implementation_pass_opcheck(op, implementation, case):
    tensors = _tensors(op, implementation, case)
    for name in op.differentiable:
        if tensors[name] is not None:
            tensors[name] = tensors[name].detach().requires_grad_()
    recorder = _RecordCustomOps()
    with recorder:
        op.call(tensors, case.arguments, implementation.name)
    assert recorder.calls, "the public function did not go through a custom op"
    for custom_op, args in recorder.calls:
        leaves = [
            arg.detach().clone().requires_grad_(arg.requires_grad) if isinstance(arg, torch.Tensor) else arg
            for arg in args
        ]
        torch.library.opcheck(custom_op, leaves)


@every_implementation
def test_torch_compile_traces_an_op_whole_and_gives_the_same_bits(op, implementation, case):
    tensors = _tensors(op, implementation, case)
    torch._dynamo.reset()
    compiled = dataclasses.replace(op, call=torch.compile(op.call, fullgraph=True, backend="aot_eager"))
    expected = evaluate(op, case, tensors, implementation.name)
    _assert_same_bits(evaluate(compiled, case, tensors, implementation.name), expected)


@every_implementation
def test_the_same_input_gives_the_same_bits_twice(op, implementation, case):
    tensors = _tensors(op, implementation, case)
    first = evaluate(op, case, tensors, implementation.name)
    _assert_same_bits(evaluate(op, case, tensors, implementation.name), first)


def _assert_same_bits(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        torch.testing.assert_close(
            found[name], tensor, rtol=0, atol=0, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
        )
