"""The dispatcher's rules, one sentence each."""

import dataclasses

import pytest
import torch

from tilestack.kernels import UnsupportedError, dispatch, ops, rms_norm
from tilestack.kernels.device import Device
from tilestack.kernels.dispatch import Call, Implementation, Op, TensorSpec
from tilestack.kernels.registration import Contract
from tilestack.kernels.rms_norm.op import OP, RMSNormParams
from tilestack.testing.cases import all_cases

CPU = Device("cpu", "cpu", "a CPU")
GPUS = [
    Device("cuda", "sm_80", "A100"),
    Device("cuda", "sm_90", "H100"),
    Device("cuda", "sm_100", "B200"),
    Device("cuda", "sm_120", "RTX PRO 6000"),
    Device("cuda", "gfx942", "MI300X"),
]
on_every_gpu = pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.arch)
for_every_op = pytest.mark.parametrize("op_name", sorted(all_cases()))


def _call(device: Device, dtype: torch.dtype = torch.bfloat16, hidden: int = 64) -> Call:
    x, weight = TensorSpec.contiguous((4, hidden), dtype), TensorSpec.contiguous((hidden,), dtype)
    return Call(device, {"x": x, "weight": weight, "residual": None}, RMSNormParams(1e-6), needs_grad=True)


def _small_calls(op_name: str, monkeypatch) -> list[tuple[str, Op, Call, str]]:
    """(case, op, call, automatic choice) of all that the public function asks the dispatcher for in small cases."""
    cases, choose, found = all_cases()[op_name], Op.choose, []
    for case in cases.cases:
        if case.gpu_only:
            continue

        def recording(op, call, implementation=None, name=case.name):
            chosen = choose(op, call, implementation)
            found.append((name, op, call, chosen.name))
            return chosen

        tensors = case.make(cases.dtypes[-1], torch.device("cpu"), torch.Generator().manual_seed(0))
        with monkeypatch.context() as patch:
            patch.setattr(Op, "choose", recording)
            patch.setattr(ops()[op_name], "_choices", {})
            cases.call(tensors, case.arguments, None)
    assert found, "no case asked the dispatcher"
    return found


@for_every_op
def test_on_a_cpu_the_automatic_choice_is_the_reference(op_name, monkeypatch):
    assert {chosen for _, _, _, chosen in _small_calls(op_name, monkeypatch)} == {"reference"}


@for_every_op
def test_on_a_gpu_the_automatic_choice_takes_every_case_of_the_grid_and_never_the_reference(op_name, monkeypatch):
    for name, op, call, _ in _small_calls(op_name, monkeypatch):
        for gpu in GPUS:
            assert op.choose(dataclasses.replace(call, device=gpu)).name != "reference", (name, gpu)


@on_every_gpu
def test_on_a_gpu_where_every_fast_implementation_refuses_the_error_has_every_reason(gpu):
    with pytest.raises(UnsupportedError) as error:
        OP.choose(_call(gpu, torch.float64))
    assert "rms_norm: no fast implementation takes this call" in str(error.value)
    assert "tilestack-triton: has no float64 path" in str(error.value)
    assert "implementation='reference'" in str(error.value)


@on_every_gpu
def test_the_reference_runs_on_a_gpu_when_asked_for_by_name(gpu):
    assert OP.choose(_call(gpu), "reference").name == "reference"


def test_an_implementation_asked_for_by_name_never_falls_back_and_says_why():
    with pytest.raises(UnsupportedError, match=r"'tilestack-triton' cannot take this call: keeps a row .* got 32768"):
        OP.choose(_call(GPUS[0], hidden=32768), "tilestack-triton")


def test_a_triton_kernel_asked_for_on_a_cpu_says_how_to_interpret_it(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(UnsupportedError, match=r"runs on cuda, the tensors are on cpu \(set TRITON_INTERPRET=1"):
        rms_norm(torch.ones(2, 4), torch.ones(4), implementation="tilestack-triton")


def test_the_interpreter_is_taken_only_when_asked_for_by_name(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert OP.choose(_call(CPU)).name == "reference"
    assert OP.choose(_call(CPU), "tilestack-triton").name == "tilestack-triton"


def test_an_unknown_name_is_answered_with_the_nearest_and_all_names():
    with pytest.raises(UnsupportedError) as error:
        OP.choose(_call(CPU), "tilestack-tritan")
    assert "did you mean 'tilestack-triton'?" in str(error.value)
    assert "'auto', 'tilestack-triton', 'reference'" in str(error.value)


def test_a_choice_is_remembered_until_something_that_it_depends_on_changes(monkeypatch):
    asked, choose = [], Op.choose
    monkeypatch.setattr(OP, "_choices", {})
    monkeypatch.setattr(Op, "choose", lambda op, call, name=None: asked.append(call) or choose(op, call, name))
    x, weight = torch.ones(2, 4), torch.ones(4)
    new = [
        lambda: rms_norm(x, weight),
        lambda: rms_norm(x.double(), weight.double()),
        lambda: rms_norm(x.T.contiguous().T, weight),
        lambda: rms_norm(x, weight.clone().requires_grad_()),
        lambda: rms_norm(x, weight, eps=1e-5),
        lambda: rms_norm(x, weight, implementation="reference"),
    ]
    for number, each in enumerate(new, start=1):
        each()
        each()
        assert len(asked) == number


def test_a_refusal_is_not_remembered_as_a_choice(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for _ in range(2):
        with pytest.raises(UnsupportedError, match="runs on cuda"):
            rms_norm(torch.ones(2, 4), torch.ones(4), implementation="tilestack-triton")


def test_auto_and_none_mean_the_same():
    assert OP.choose(_call(GPUS[0]), "auto") == OP.choose(_call(GPUS[0]), None)


@for_every_op
def test_reasons_list_every_implementation_and_agree_with_the_choice(op_name, monkeypatch):
    for name, op, call, _ in _small_calls(op_name, monkeypatch):
        call = dataclasses.replace(call, device=GPUS[1])
        reasons = op.reasons(call)
        assert list(reasons) == [each.name for each in op.implementations], name
        assert reasons[op.choose(call).name] is None
        for refused in [each for each, reason in reasons.items() if reason]:
            with pytest.raises(UnsupportedError):
                op.choose(call, refused)


def test_a_missing_package_is_a_reason_and_not_an_import_error(monkeypatch):
    monkeypatch.setattr(dispatch, "_OPS", {})
    vendor = Implementation("vendor", "no.such.module", "vendor", packages=("no_such_package",))
    op = Op(Contract("made_up", ("x", "weight", "residual?"), ("out",), RMSNormParams, lambda *_: ()), (vendor,))
    assert op.reasons(_call(GPUS[1])) == {"vendor": "needs the package no_such_package, which is not installed"}


@pytest.mark.parametrize(
    ("low", "high", "device", "reason"),
    [
        (90, None, GPUS[1], None),
        (90, None, GPUS[0], "needs sm_90 or newer, this is sm_80"),
        (90, 90, GPUS[2], "is written for sm_90 at most, this is sm_100"),
        (90, None, GPUS[4], "needs an NVIDIA GPU, this is gfx942"),
        (None, None, GPUS[4], None),
    ],
)
def test_an_architecture_out_of_range_is_refused_with_both_numbers(low, high, device, reason):
    made = Implementation("made", "no.module", "made", min_capability=low, max_capability=high)
    assert made.refuses_machine(device) == reason


def test_every_op_ends_with_its_reference_and_has_cases():
    assert set(ops()) == set(all_cases())
    for name, op in ops().items():
        assert op.implementations[-1].name == "reference", name


@pytest.mark.parametrize("shape", [(), (1,), (3, 4), (2, 1, 5), (0, 3)])
def test_the_spec_of_a_tensor_that_does_not_exist_has_the_strides_of_a_contiguous_one(shape):
    made = torch.empty(shape)
    assert TensorSpec.contiguous(shape, made.dtype).is_contiguous
    assert TensorSpec.of(made).is_contiguous
    if 0 not in shape:
        assert TensorSpec.contiguous(shape, made.dtype) == TensorSpec.of(made)


def test_a_transposed_tensor_is_not_contiguous_and_a_dimension_of_one_does_not_count():
    assert not TensorSpec.of(torch.empty(3, 4).T).is_contiguous
    assert TensorSpec.of(torch.empty(3, 4)[:, None].as_strided((3, 1, 4), (4, 99, 1))).is_contiguous
