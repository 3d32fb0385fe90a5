"""Every implementation of every op, on the one shared grid of cases, against the float64 oracle."""

import pytest
import torch

from tilestack.kernels import UnsupportedError, ops
from tilestack.kernels.device import Device
from tilestack.testing.cases import all_cases
from tilestack.testing.compare import check

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _grid():
    for op_name, op in all_cases().items():
        for implementation in ops()[op_name].implementations:
            if implementation.name == "reference":
                continue  # it is both the oracle and the competitor
            for case in op.cases:
                if case.gpu_only and DEVICE.type != "cuda":
                    continue
                for dtype in op.dtypes:
                    name = f"{op_name}-{implementation.name}-{case.name}-{str(dtype)[6:]}".replace(" ", "_")
                    yield pytest.param(op, implementation, case, dtype, id=name)


@pytest.mark.parametrize(("op", "implementation", "case", "dtype"), list(_grid()))
def test_outputs_and_gradients_are_within_twice_the_error_of_eager(op, implementation, case, dtype):
    machine = implementation.refuses_machine(Device.of(DEVICE))
    if machine:
        pytest.skip(machine)
    try:
        check(op, case, implementation.name, dtype, DEVICE)
    except UnsupportedError as refusal:
        pytest.skip(str(refusal))
