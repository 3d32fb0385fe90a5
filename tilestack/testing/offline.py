"""Compiles every Triton kernel for GPUs that are not there, and says what the compiler made of it.

    python -m tilestack.testing.offline [op ...] [--target sm_90 ...] [--thorough | --case NAME ...]

The host functions of every implementation in Triton or Gluon run on tensors of torch's meta device (no memory, so real
model shapes cost nothing) with Triton's launcher in front of a driver that pretends to be the target: signatures,
constexprs, alignment and warps are the ones of a real launch. What the launcher would compile is compiled here, and
registers, spills and shared memory are read from the machine code. Host code that reads a value from the device fails
here: there is none.

Run it in a process without TRITON_INTERPRET: kernels are bound to the interpreter or to the compiler at import.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import re
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from tilestack.kernels import device as device_facts
from tilestack.kernels import launch, ops
from tilestack.kernels.dispatch import Implementation, Op, UnsupportedError
from tilestack.kernels.registration import InPlaceContract, _pick
from tilestack.testing.cases import all_cases
from tilestack.testing.compare import Case, OpCases
from tilestack.testing.loop_carry import finding_lost_variables


@dataclass(frozen=True)
class Target:
    """A GPU to compile for. shared_bytes: what one block may have; multiprocessors: of a common card."""

    backend: str
    arch: int | str
    warp_size: int
    shared_bytes: int
    multiprocessors: int
    max_registers: int


# Shared memory: CUDA C++ Programming Guide, table of compute capabilities; CDNA3 ISA guide, section 1 (64 KiB of LDS).
TARGETS = {
    "sm_80": Target("cuda", 80, 32, 163 * 1024, 108, 255),
    "sm_86": Target("cuda", 86, 32, 99 * 1024, 84, 255),
    "sm_89": Target("cuda", 89, 32, 99 * 1024, 128, 255),
    "sm_90": Target("cuda", 90, 32, 227 * 1024, 132, 255),
    "sm_100": Target("cuda", 100, 32, 227 * 1024, 148, 255),
    "sm_120": Target("cuda", 120, 32, 99 * 1024, 188, 255),
    "gfx942": Target("hip", "gfx942", 64, 64 * 1024, 304, 512),
}


@dataclass(frozen=True)
class Launch:
    """One distinct kernel that the host functions launched: what Triton's launcher hands to the compiler."""

    kernel: JITFunction
    case: str
    signature: dict[str, str]
    constexprs: dict[tuple, Any]
    attrs: dict[tuple, Any]
    options: dict[str, Any]
    key: str


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of a launch.

    registers: of one thread (AMD: vector registers). spills: NVIDIA: instructions that access local memory; AMD:
    spilled vector registers. shared_bytes: of one block. seconds: of compiling.
    """

    op: str
    kernel: str
    target: str
    case: str
    constexprs: str
    warps: int
    stages: int
    registers: int
    spills: int
    shared_bytes: int
    seconds: float

    def violations(self, allowed_spills: int = 0) -> list[str]:
        """The budgets that this kernel breaks, in words."""
        target = TARGETS[self.target]
        broken = []
        if self.registers > target.max_registers:
            broken.append(f"{self.registers} registers a thread, the target has {target.max_registers}")
        if self.spills > allowed_spills:
            broken.append(f"{self.spills} spills, {allowed_spills} are allowed")
        if self.shared_bytes > target.shared_bytes:
            broken.append(f"{self.shared_bytes} bytes of shared memory, a block may have {target.shared_bytes}")
        return [f"{self.kernel} on {self.target} ({self.case}; {self.constexprs}): {each}" for each in broken]


class _PretendDriver:
    """Answers what Triton's launcher asks before it compiles."""

    def __init__(self, name: str):
        target = TARGETS[name]
        self._device = name  # the launcher keeps one cache for each device
        self._target = GPUTarget(target.backend, target.arch, target.warp_size)

    def get_current_device(self) -> str:
        return self._device

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self._target


def _pretended_device(name: str) -> device_facts.Device:
    return device_facts.Device("cuda", name, f"{name}, not there")


def _addmm(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, out: torch.Tensor, **options: Any) -> torch.Tensor:
    """In place of torch.addmm, which in torch 2.11 fails for meta tensors of another dtype than their sum's."""
    return out


@contextlib.contextmanager
def _pretending(name: str) -> Iterator[None]:
    """Within the context, meta tensors are on the target and Triton launches for it."""
    target = TARGETS[name]
    facts = {("meta", None): _pretended_device(name)}
    properties = types.SimpleNamespace(multi_processor_count=target.multiprocessors, name=name)
    launch._multiprocessors.cache_clear()
    with (
        mock.patch.object(device_facts, "_FACTS", facts),
        mock.patch.object(torch.Tensor, "is_cuda", property(lambda self: self.device.type == "meta"), create=True),
        mock.patch.object(torch.cuda, "current_device", lambda: None),  # the index of a meta tensor's device
        mock.patch.object(torch.cuda, "get_device_properties", lambda device=None: properties),
        mock.patch.object(torch, "addmm", _addmm),
    ):
        triton.runtime.driver.set_active(_PretendDriver(name))
        yield
    launch._multiprocessors.cache_clear()


@contextlib.contextmanager
def _recording(case: str) -> Iterator[list[Launch]]:
    """Within the context, launches are noted down instead of compiled and run."""
    launches: list[Launch] = []

    def hook(*, key, fn, compile, **_):
        options = json.loads(compile["specialization_data"])["options"]
        options = {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}
        signature, constants, attrs = compile["signature"], compile["constants"], compile["configs"][0]
        launches.append(Launch(fn.jit_function, case, signature, constants, attrs, options, f"{fn.name} {key}"))
        return True  # tells the launcher that there is nothing left to do

    with triton.knobs.runtime.scope():
        triton.knobs.runtime.jit_cache_hook = hook
        yield launches


class _Direct:
    """Stands where an implementation's custom ops were: calls its host functions on the meta tensors themselves.

    The custom ops would run their fake kernels, which launch nothing.
    """

    def __init__(self, op: Op, implementation: str):
        self._contract = op.contract
        self.module = op._registered[implementation].module

    def __call__(self, tensors: tuple, params: Any, needs_grad: bool) -> tuple:
        with torch.no_grad():
            if isinstance(self._contract, InPlaceContract):
                self.module.update(*tensors, params)
                return ()
            results = self.module.forward(*tensors, params)
            if self._contract.differentiable:
                self._backward(tensors, results, params)
        return results

    def _backward(self, tensors: tuple, results: tuple, params: Any) -> None:
        contract, module = self._contract, self.module
        named = dict(zip(contract.input_names, tensors, strict=True))
        needs = tuple(name for name, tensor in named.items() if tensor is not None and tensor.requires_grad)
        named.update(zip((*contract.outputs, *module.AUXILIARY), results, strict=True))
        upstream = {
            name for name in contract.outputs if name not in contract.constants and tuple(named[name].shape) != (0,)
        }
        grads = [torch.empty_like(named[name]) if name in upstream else None for name in contract.outputs]
        module.backward(*grads, *[_pick(named, name) for name in module.SAVED], needs=needs, params=params)


def implementations(op: str) -> list[Implementation]:
    """The op's implementations that Triton compiles."""
    return [each for each in ops()[op].implementations if "triton" in each.packages]


def record(op: OpCases, case: Case, implementation: str, target: str) -> list[Launch]:
    """The kernels that forward and backward of the case would launch on the target, in bfloat16 if the grid has it.

    Raises UnsupportedError if the implementation refuses the case there.
    """
    dtype = torch.bfloat16 if torch.bfloat16 in op.dtypes else op.dtypes[0]
    with FakeTensorMode():  # shapes and strides of the inputs without their memory
        fakes = case.make(dtype, torch.device("cpu"), torch.Generator().manual_seed(0))
    tensors = {name: _on_meta(tensor, name in op.differentiable) for name, tensor in fakes.items()}
    with contextlib.ExitStack() as stack:
        for each in ops().values():
            direct = {name: _Direct(each, name) for name in each._registered}
            stack.enter_context(mock.patch.dict(each._registered, direct))
        stack.enter_context(_pretending(target))
        launches = stack.enter_context(_recording(case.name))
        op.call(tensors, case.arguments, implementation)
    return launches


def _on_meta(tensor: Any, differentiable: bool) -> Any:
    """The same strides and the same alignment on the meta device; what is no tensor stays as it is."""
    if not torch.is_tensor(tensor):
        return tensor
    items = tensor.untyped_storage().size() // tensor.element_size()
    storage = torch.empty(items, dtype=tensor.dtype, device="meta")
    moved = storage.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
    return moved.requires_grad_(differentiable and tensor.is_floating_point())


def distinct_launches(
    op: OpCases, implementation: str, target: str, thorough: bool, names: Collection[str] = ()
) -> list[Launch]:
    """What is worth compiling: all that real shapes launch (Qwen3-30B-A3B, or if thorough every one).

    A kernel that they do not launch is taken from the first other case that does. With names, the cases of these names
    and nothing else.
    """
    real = sorted((case for case in op.cases if case.gpu_only), key=lambda case: "Qwen3-30B-A3B" not in case.name)
    whole = real if thorough else real[:1]
    rest = [*(case for case in op.cases if not case.gpu_only), *real[len(whole) :]]
    if names:
        whole, rest = [case for case in op.cases if case.name in names], []
    found: dict[str, Launch] = {}
    known: set[JITFunction] = set()
    for case in [*whole, *rest]:
        try:
            launches = record(op, case, implementation, target)
        except UnsupportedError:
            continue
        for each in launches:
            if case in whole or each.kernel not in known:
                found.setdefault(each.key, each)
        known |= {each.kernel for each in launches}
    return list(found.values())


def compile_launch(op: str, each: Launch, target_name: str) -> Compiled:
    """Compile one launch for the target and read what came out."""
    target = TARGETS[target_name]
    source = each.kernel.ASTSource(each.kernel, each.signature, each.constexprs, each.attrs)
    started = time.perf_counter()
    kernel = triton.compile(
        source, target=GPUTarget(target.backend, target.arch, target.warp_size), options=each.options
    )
    seconds = time.perf_counter() - started
    registers, spills = amd_usage(kernel.asm["amdgcn"]) if target.backend == "hip" else _nvidia_usage(kernel.asm)
    names = each.kernel.arg_names
    constexprs = ", ".join(f"{names[path[0]]}={value}" for path, value in sorted(each.constexprs.items()))
    return Compiled(
        op, each.kernel.__name__, target_name, each.case, constexprs, kernel.metadata.num_warps,
        kernel.metadata.num_stages, registers, spills, kernel.metadata.shared, round(seconds, 2),
    )  # fmt: skip


def _nvidia_usage(asm: dict[str, Any]) -> tuple[int, int]:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        run = [subprocess.run([tool, flag, file.name], capture_output=True, text=True, check=True).stdout
               for flag in ("-res-usage", "-sass")]  # fmt: skip
    usage, sass = run
    # local memory holds spilled registers and nothing else: Triton has no arrays that are indexed at run time
    return int(re.search(r"REG:(\d+)", usage).group(1)), len(re.findall(r"\b(?:STL|LDL)\b", sass))


def amd_usage(assembly: str) -> tuple[int, int]:
    """Vector registers, and how many were spilled to memory; spilled scalars go to lanes of vector registers."""

    def number(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", assembly).group(1))

    return number("vgpr_count"), number("vgpr_spill_count")


def unreached(op: str, launches: list[Launch]) -> set[str]:
    """Kernels that the op's package defines and that none of the launches runs or calls."""
    reached: set[JITFunction] = set()
    waiting = [each.kernel for each in launches]
    while waiting:
        kernel = waiting.pop()
        if kernel in reached:
            continue
        reached.add(kernel)
        used = (kernel.fn.__globals__.get(name) for name in kernel.fn.__code__.co_names)
        waiting += [each for each in used if isinstance(each, JITFunction)]
    prefix = f"tilestack.kernels.{op}."
    defined = {
        each
        for name, module in list(sys.modules.items())
        if name.startswith(prefix)
        for each in vars(module).values()
        if isinstance(each, JITFunction) and each.fn.__module__ == name
    }
    return {each.__name__ for each in defined - reached}


def report(op: str, targets: list[str], thorough: bool = False, names: Collection[str] = ()) -> dict[str, Any]:
    """Compile the op's kernels for the targets.

    Returns {"compiled": [Compiled as a dict], "lost_variables": [...], "unreached": [names of kernels]}.
    """
    compiled, launched = [], []
    with tempfile.TemporaryDirectory() as cache, triton.knobs.cache.scope(), finding_lost_variables() as lost:
        triton.knobs.cache.dir = cache
        for target in targets:
            for implementation in implementations(op):
                if implementation.refuses_machine(_pretended_device(target)):
                    continue
                launches = distinct_launches(all_cases()[op], implementation.name, target, thorough, names)
                compiled += [compile_launch(op, each, target) for each in launches]
                launched += launches
    return {
        "compiled": [dataclasses.asdict(each) for each in compiled],
        "lost_variables": sorted(str(each) for each in lost),
        "unreached": sorted(unreached(op, launched)),
    }


def _table(compiled: list[Compiled]) -> str:
    head = ("target", "kernel", "warps", "stages", "registers", "spills", "shared KiB", "seconds", "case", "constexprs")
    body = [
        (each.target, each.kernel, str(each.warps), str(each.stages), str(each.registers), str(each.spills),
         f"{each.shared_bytes / 1024:.1f}", f"{each.seconds:.2f}", each.case, each.constexprs)
        for each in compiled
    ]  # fmt: skip
    widths = [max(len(row[i]) for row in (head, *body)) for i in range(len(head))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
                     for row in (head, *body))  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """The command line: a table for people, or with --json one report for the tests."""
    parser = argparse.ArgumentParser(prog="python -m tilestack.testing.offline", description=__doc__.split("\n")[0])
    known = sorted(all_cases())
    parser.add_argument("op", nargs="*", help=f"ops (default: all): {', '.join(known)}")
    parser.add_argument("--target", action="append", choices=TARGETS, help="may be repeated; default: all")
    parser.add_argument("--thorough", action="store_true", help="every real shape of the grid, not only the first")
    parser.add_argument("--case", action="append", default=[], help="of the grid, this one alone; may be repeated")
    parser.add_argument("--json", action="store_true", help="one JSON object an op and line instead of tables")
    args = parser.parse_args(argv)
    for op in args.op or known:
        if op not in known:
            parser.error(f"op {op!r} is not one of {', '.join(known)}")
        found = report(op, args.target or list(TARGETS), args.thorough, args.case)
        if args.json:
            print(json.dumps(found), flush=True)
            continue
        compiled = [Compiled(**each) for each in found["compiled"]]
        print(f"\n{op}\n{_table(compiled)}")
        for line in [
            *found["lost_variables"],
            *(f"not launched on these targets: {name}" for name in found["unreached"]),
        ]:
            print(line)
        for each in compiled:
            print(*each.violations(), sep="\n", end="\n" if each.violations() else "")
    return 0


if __name__ == "__main__":
    sys.exit(main())
