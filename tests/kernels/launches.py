"""Looks at what kernels/launch.py makes of launches, on a GPU that is not there. Prints one JSON object.

    python launches.py CASES        with so many small cases of the grid for each implementation

A program of its own, because kernels of a process with TRITON_INTERPRET=1 are no kernels to Triton. Nothing is
compiled: what Triton would compile is written down, and so is every launch of it.
"""

import contextlib
import functools
import itertools
import json
import operator
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import torch
import triton
import triton.language as tl
from triton import AsyncCompileMode
from triton.compiler import CompiledKernel
from triton.runtime.jit import compute_cache_key

from tilestack.kernels import launch
from tilestack.kernels._gluon import TensorDescriptor, tensor_descriptor
from tilestack.kernels.dispatch import UnsupportedError
from tilestack.testing import offline
from tilestack.testing.cases import all_cases

COMPILED, LAUNCHED = [], []  # (kernel, what decides the result, by the launching thread); (compiled, grid, arguments)


class Compiled(CompiledKernel):
    """What Triton's launcher and launch.py need of a compiled kernel."""

    def __init__(self, src):
        self.src, self.metadata, self.function, self.packed_metadata = src, None, None, None

    def _init_handles(self):
        pass

    def launch_metadata(self, *args):
        pass

    def run(self, *args):
        LAUNCHED.append((id(self), args[:3], [described(each) for each in args[9:]]))


def described(value):
    if isinstance(value, TensorDescriptor):
        return value.base.dtype, value.shape, value.strides, value.block_shape
    return (value.dtype, value.shape, value.stride()) if torch.is_tensor(value) else value


def compile_nothing(src, target=None, options=None, _env_vars=None):
    if src.fn is sick:
        raise ValueError("the compiler's")
    is_alone = threading.current_thread() is threading.main_thread()
    COMPILED.append((src.fn.__name__, src.hash() + str(target) + str(options), is_alone))
    return Compiled(src)


def calls(most: int) -> Iterator[tuple[str, Callable[[], list]]]:
    """Small cases of every op, `most` with each implementation in Triton, as functions that run the host functions."""
    for op, cases in all_cases().items():
        for implementation in offline.implementations(op):
            small = (case for case in cases.cases if not case.gpu_only)
            taken = (case for case in small if is_taken(cases, case, implementation.name))
            for case in itertools.islice(taken, most):
                yield op, functools.partial(offline.record, cases, case, implementation.name, "sm_90")


def is_taken(cases, case, implementation):
    try:
        with mock.patch.object(launch, "run"):
            offline.record(cases, case, implementation, "sm_90")
    except UnsupportedError:
        return False
    return True


# --- does the key keep apart what Triton keeps apart? ---


class Kinds:
    """Notes which of Triton's keys belong to each of ours."""

    def __init__(self):
        self.found = {}

    def see(self, kernel, grid, *args, **options):
        key = launch._key(kernel, args, options)
        assert key is not None, f"{kernel.__name__} has an argument of a class that launch.py does not know"
        device = triton.runtime.driver.active.get_current_device()
        *_, binder = kernel.device_caches[device]
        _, specialization, rest = binder(*args, **options)
        self.found.setdefault(key, set()).add((device, compute_cache_key({}, specialization, rest)))

    def confused(self):
        return sorted({key[0].__name__ for key, keys in self.found.items() if len(keys) > 1})


@triton.jit
def probe(value, CONSTANT: tl.constexpr):
    pass


def values():
    powers = [1 << bits for bits in (0, 1, 3, 4, 5, 30, 31, 32, 62, 63)]
    around = {power + each for power in powers for each in (-17, -16, -1, 0, 1, 8, 15, 16)}
    yield from (each for each in {*around, *(-each for each in around)} if -(2**63) <= each < 2**64)
    yield from (True, False, None, 0.0, 1.0, 16.0, 2.5)
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.int32, torch.int64, torch.uint8, torch.bool):
        whole = torch.zeros(64, dtype=dtype)
        yield from (whole[start:] for start in (0, 1, 2, 4, 8, 16))
        yield torch.nn.Parameter(whole, requires_grad=False)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        rows = torch.zeros(64, 64, dtype=dtype)
        for block in ([64, 64], [64, 32], [32, 64]):
            yield from (tensor_descriptor(rows, block, width) for width in (0, 64, 128))


def kinds_of_values():
    kinds = Kinds()
    for device in ("sm_80", "sm_90"):
        with offline._pretending(device), mock.patch.object(torch.cuda, "current_device", lambda name=device: name):
            for value in values():
                kinds.see(probe, (1,), value, CONSTANT=0, num_warps=4)
            for constant, warps in ((16, 4), (17, 4), (None, 4), ("text", 4), (0, 8)):
                kinds.see(probe, (1,), 0, CONSTANT=constant, num_warps=warps)
    return kinds


def unnoticed():
    """Ways to look less closely at an argument that nobody finds out."""
    integer, key = launch._KINDS[int], launch._key
    ways = {
        "integers alike": (int, lambda value: 3),
        "1 as any other": (int, lambda value: 3 if value == 1 else integer(value)),
        "multiples of 8 as of 16": (int, lambda value: 16 if value % 8 == 0 else integer(value)),
        "64 bits as 32": (int, lambda value: integer(value % 2**16 + 2**16)),
        "unsigned as signed": (int, lambda value: integer(value - 2**63 if value >= 2**63 else value)),
        "booleans as integers": (bool, integer),
        "floats as integers": (float, lambda value: 3),
        "None as 1": (type(None), lambda value: 1),
        "tensors of any dtype": (torch.Tensor, lambda value: value.data_ptr() % 16 == 0),
        "tensors of any alignment": (torch.Tensor, lambda value: value.dtype),
        "parameters of any alignment": (torch.nn.Parameter, lambda value: (value.dtype,)),
        "tensors aligned to 8 bytes": (torch.Tensor, lambda value: (value.dtype, value.data_ptr() % 8 == 0)),
        "descriptors of any dtype": (TensorDescriptor, lambda value: value.kind[1:]),
        "descriptors of any layout": (TensorDescriptor, lambda value: (value.kind[0], *value.kind[2:])),
        "descriptors of any block": (TensorDescriptor, lambda value: value.kind[:2]),
    }
    keys = {
        "any device": lambda *call: (key(*call)[0], *key(*call)[2:]),
        "any options": lambda kernel, args, options: key(kernel, args, {"CONSTANT": options["CONSTANT"]}),
        "any constants": lambda kernel, args, options: key(kernel, args, {"num_warps": options["num_warps"]}),
    }
    plants = {name: mock.patch.dict(launch._KINDS, {kind: way}) for name, (kind, way) in ways.items()}
    plants |= {name: mock.patch.object(launch, "_key", way) for name, way in keys.items()}
    missed = []
    for name, plant in plants.items():
        with plant:
            if not kinds_of_values().confused():
                missed.append(name)
    return missed


def kinds_of_ops(every):
    kinds = Kinds()
    with mock.patch.object(launch, "run", kinds.see):
        past = [(op, each.kernel.__name__) for op, call in every for each in call()]
    return kinds.confused(), past


# --- are launches those of Triton, and what is compiled side by side what they look up? ---


def launches_of(call):
    LAUNCHED.clear()
    call()
    return list(LAUNCHED)


def plainly(kernel, grid, *args, **options):
    kernel[grid](*args, **options)


def prepared_plainly(prepared, kernel, *tensors):
    plainly(kernel, prepared.grid, *tensors, *prepared.numbers, **prepared.options)


def launched_otherwise(every):
    """Ops whose launches are not what Triton's own are, the first time or the second."""
    wrong = set()
    with mock.patch.object(offline, "_recording", lambda case: contextlib.nullcontext([])):
        for op, call in every:
            first, second = launches_of(call), launches_of(call)
            every_run = mock.patch.object(launch, "run", plainly)
            with every_run, mock.patch.object(launch.Prepared, "run", prepared_plainly):
                of_triton = launches_of(call)
            if not first == second == of_triton:
                wrong.add(op)
    return sorted(wrong)


def prepared_launches():
    """Launches of one Prepared with tensors of all kinds and two kernels, in two rounds; and those of Triton."""
    whole = torch.zeros(64)
    tensors = [whole, whole[1:], torch.nn.Parameter(whole), whole.half(), whole[4:], whole[2:]]
    prepared = launch.Prepared((3, 2), 5, 16, 1.5, CONSTANT=7, num_warps=4)
    calls = [(kernel, first, second) for kernel in (mixed, mixed_too) for first in tensors for second in (whole, None)]
    with offline._pretending("sm_90"):
        found = [launches_of(lambda call=call: prepared.run(*call)) for _ in range(2) for call in calls]
        return [found, [launches_of(lambda call=call: prepared_plainly(prepared, *call)) for call in calls] * 2]


@triton.jit
def mixed(first, second, number, large, ratio, CONSTANT: tl.constexpr):
    pass


@triton.jit
def mixed_too(first, second, number, large, ratio, CONSTANT: tl.constexpr):
    pass


# --- what fails ---


@triton.jit
def healthy(pointer):
    pass


@triton.jit
def late(pointer):
    pass


@triton.jit
def sick(pointer):
    pass


@launch.together
def host(tensor, kernels, error=None):
    for kernel in kernels:
        launch.run(kernel, (1,), tensor, num_warps=4)
    if error is not None:
        raise error


def outcome(*arguments, call=host):
    """The error of a call, and how many launches, threads and waiting launches it leaves behind."""
    LAUNCHED.clear()
    before = threading.active_count()
    with offline._pretending("sm_90"):
        try:
            call(torch.empty(16, device="meta"), *arguments)
            error = None
        except ValueError as found:
            error = str(found)
    return [error, len(LAUNCHED), threading.active_count() - before, launch._HERE.waiting]


def outcome_in_tritons_mode():
    """Launches while the kernel is being compiled elsewhere: in 3.8 Triton has a future of it."""
    with ThreadPoolExecutor(1) as pool, AsyncCompileMode(pool):
        return outcome((late, late, late), call=host.__wrapped__)


def failures():
    with mock.patch.object(launch, "on_device", side_effect=ValueError("the device's")):
        device = outcome((healthy, healthy))
    return {
        "device": device,
        "host": outcome((healthy, sick), ValueError("the host function's")),
        "compiler": outcome((healthy, sick, healthy)),
        "afterwards": outcome((healthy, healthy)),
        "while it compiles": [outcome_in_tritons_mode(), outcome((late, late))],
    }


def main():
    offline._PretendDriver.launcher_cls = lambda self, src, metadata: None
    most = int(sys.argv[1])
    every = list(calls(most))
    confused, past = kinds_of_ops(every)
    found = {
        "ops": sorted({op for op, _ in every}),
        "confused": kinds_of_values().confused() + confused,
        "unnoticed": unnoticed(),
        "past launch.run": past,
        "launched otherwise": launched_otherwise(every),
        "prepared": operator.eq(*prepared_launches()),
    }
    sources = [(name, source) for name, source, _ in COMPILED]
    found |= {
        "compiled twice": sorted({name for name, source in sources if sources.count((name, source)) > 1}),
        "alone": sorted({name for name, _, is_alone in COMPILED if is_alone}),
        "side by side": sorted({name for name, _, is_alone in COMPILED if not is_alone}),
        **failures(),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    with mock.patch("triton.compiler.compile", compile_nothing):
        main()
