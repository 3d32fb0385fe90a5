"""Every implementation of every op, on the one shared grid of cases, against the float64 oracle."""

import contextlib
import fcntl
import importlib
import os
import tempfile
from pathlib import Path

import pytest
import torch
from refusals import LACKS, lacking

from tilestack.kernels import UnsupportedError, dispatch, ops
from tilestack.kernels.device import Device
from tilestack.kernels.dispatch import Op
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
                    yield pytest.param(op_name, op, implementation, case, dtype, id=name)


@contextlib.contextmanager
def room_for(case):
    """The oracle of a large case takes gigabytes: of the processes of `pytest -n`, at most three run one at a time."""
    if not case.gpu_only:
        yield
        return
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:])
    with (Path(tempfile.gettempdir()) / f"tilestack-large-case-{worker % 3}").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
        torch.cuda.empty_cache()


@pytest.mark.parametrize(("op_name", "op", "implementation", "case", "dtype"), list(_grid()))
def test_outputs_and_gradients_are_within_twice_the_error_of_eager(op_name, op, implementation, case, dtype):
    absent = implementation.refuses_machine(Device.of(DEVICE)) or dispatch._missing(implementation.packages)
    if absent:
        pytest.skip(absent)
    with room_for(case):
        tensors = case.make(dtype, DEVICE, torch.Generator().manual_seed(0))
        without = lacking(op_name, implementation.name, tensors, case.arguments)
        if without:
            with pytest.raises(UnsupportedError) as refusal:
                op.call(tensors, case.arguments, implementation.name)
            pytest.skip(f"lacks {', '.join(sorted(without))}: {refusal.value}")
        check(op, case, implementation.name, dtype, DEVICE)


@pytest.mark.parametrize("op_name", sorted(all_cases()))
def test_an_implementation_refuses_exactly_the_calls_that_have_what_it_lacks(op_name, monkeypatch):
    """The question needs no GPU and no vendor's package, so it is asked of all of them here."""
    cases, calls, choose = all_cases()[op_name], [], Op.choose
    monkeypatch.setattr(Op, "choose", lambda op, call, name=None: calls.append((op, call)) or choose(op, call, name))
    for case in cases.cases:
        if case.gpu_only:
            continue
        for dtype in cases.dtypes:
            tensors = case.make(dtype, torch.device("cpu"), torch.Generator().manual_seed(0))
            calls.clear()
            ops()[op_name]._choices.clear()  # what is remembered is not asked again
            cases.call(tensors, case.arguments, None)
            op, call = next((op, call) for op, call in calls if op.contract.op == op_name)
            for implementation in op.implementations:
                reason = importlib.import_module(implementation.module).refuses(call)
                without = lacking(op_name, implementation.name, tensors, case.arguments)
                assert bool(reason) == bool(without), (implementation.name, case.name, dtype, reason, without)


def test_what_may_be_refused_is_said_of_implementations_that_exist():
    known = {(name, each.name) for name, op in ops().items() for each in op.implementations}
    assert set(LACKS) <= known
