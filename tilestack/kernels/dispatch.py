"""The one dispatcher: which implementation of an op runs, and why each other one does not.

An op lists its implementations in order of preference. Each is asked whether it refuses the call, which is
described by metadata alone (shapes, dtypes, device, flags), so the same question serves dispatch, the text of
an error, `tilestack explain` and the skips of the tests. The rules:

* Asked for by name, an implementation never falls back: a refusal is an error that says why.
* On a GPU the automatic choice never takes the reference: slow answers are asked for, not stumbled into.
* On a CPU the automatic choice is the reference: plain torch, which is the definition of the op.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.machinery
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from tilestack.kernels import registration
from tilestack.kernels.device import Device, interpreting


class UnsupportedError(ValueError):
    """No implementation can take the call, or the one asked for by name refuses it."""


@dataclass(frozen=True)
class TensorSpec:
    """A tensor as the dispatcher sees it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    stride: tuple[int, ...]

    @staticmethod
    def of(tensor: torch.Tensor) -> TensorSpec:
        return TensorSpec(tuple(tensor.shape), tensor.dtype, tensor.stride())

    @staticmethod
    def contiguous(shape: tuple[int, ...], dtype: torch.dtype) -> TensorSpec:
        """The spec of a tensor that does not exist (yet): what `explain` and `plan` ask with."""
        stride, step = [], 1
        for size in reversed(shape):
            stride.append(step)
            step *= size
        return TensorSpec(tuple(shape), dtype, tuple(reversed(stride)))

    @property
    def is_contiguous(self) -> bool:
        """Whether the elements lie one after the other; as in torch, the stride of a dimension of 1 does not count."""
        dense = TensorSpec.contiguous(self.shape, self.dtype).stride
        return 0 in self.shape or all(
            size == 1 or have == want for size, have, want in zip(self.shape, self.stride, dense, strict=True)
        )


@dataclass(frozen=True)
class Call:
    """One call of an op, described by metadata alone.

    backward_alone: the forward was run elsewhere, so nothing of it is known but inputs and outputs.
    """

    device: Device
    tensors: Mapping[str, TensorSpec | None]
    params: Any
    needs_grad: bool
    backward_alone: bool = False

    def dtype(self, name: str) -> torch.dtype:
        return self.tensors[name].dtype

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name].shape


@dataclass(frozen=True)
class Implementation:
    """One way to compute an op.

    name: what users, benchmarks and `explain` call it ("tilestack-triton", "reference", "cudnn", ...).
    module: dotted path; the module holds `forward`, `backward` and `refuses` (see registration.py). It imports a
        vendor's package inside its functions alone, so that importing it is cheap and always works.
    suffix: ends the names of its custom ops: tilestack::<op>_forward_<suffix>.
    devices: device types it runs on.
    min_capability, max_capability: NVIDIA architectures it runs on, both included; None means any.
    packages: modules that must be importable.
    interpretable: a Triton kernel, which TRITON_INTERPRET=1 runs on the CPU.
    note: what a user should know of it before relying on it; shown by `explain`.
    """

    name: str
    module: str
    suffix: str
    devices: tuple[str, ...] = ("cuda",)
    min_capability: int | None = None
    max_capability: int | None = None
    packages: tuple[str, ...] = ()
    interpretable: bool = False
    note: str = ""

    def refuses_machine(self, device: Device) -> str | None:
        """None if the implementation runs on this machine at all, else the reason why it does not."""
        if self.interpretable and device.type == "cpu" and interpreting():
            return None
        if device.type not in self.devices:
            hint = " (set TRITON_INTERPRET=1 to run it in Triton's interpreter)" if self.interpretable else ""
            return f"runs on {' and '.join(self.devices)}, the tensors are on {device.type}{hint}"
        return self._refuses_capability(device)

    def _refuses_capability(self, device: Device) -> str | None:
        low, high, have = self.min_capability, self.max_capability, device.capability
        if low is None and high is None:
            return None
        if have is None:
            return f"needs an NVIDIA GPU, this is {device.arch}"
        if low is not None and have < low:
            return f"needs sm_{low} or newer, this is {device.arch}"
        if high is not None and have > high:
            return f"is written for sm_{high} at most, this is {device.arch}"
        return None


def portable(op: str) -> Implementation:
    """The record of an op's plain Triton implementation."""
    module = f"tilestack.kernels.{op}.triton_portable"
    return Implementation("tilestack-triton", module, "triton", packages=("triton",), interpretable=True)


def reference(op: str) -> Implementation:
    """The record of an op's definition in plain torch."""
    return Implementation("reference", f"tilestack.kernels.{op}.reference", "reference", devices=("cpu", "cuda"))


class Op:
    """An op of the package: its contract and its implementations, in order of preference.

    Making one registers the custom ops of every implementation whose packages are installed: at import, never at
    the first call, because torch.compile cannot trace a registration.
    """

    def __init__(
        self,
        contract: registration.Contract | registration.InPlaceContract,
        implementations: tuple[Implementation, ...],
    ):
        self.contract = contract
        self.implementations = implementations
        self._choices: dict[tuple, Implementation] = {}
        self._missing = {each.name: _missing(each.packages) for each in implementations}
        self._registered = {
            each.name: registration.register(contract, each.suffix, each.module)
            for each in implementations
            if not self._missing[each.name]
        }
        _OPS[contract.op] = self

    def __call__(self, tensors: tuple[torch.Tensor | None, ...], params: Any, implementation: str | None) -> tuple:
        """Choose an implementation and run it.

        tensors: in the contract's order, None where an optional one is absent. Returns the contract's outputs: an
        empty tuple from an op that works in place.
        """
        needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
        in_place = isinstance(self.contract, registration.InPlaceContract)
        if torch.compiler.is_compiling() or in_place:  # symbols are no keys; adamw's params differ with every step
            chosen = self.choose(self._describe(tensors, params, needs_grad), implementation)
        else:
            chosen = self._choose_again(tensors, params, needs_grad, implementation)
        results = self._registered[chosen.name](tensors, params, needs_grad)
        results = results if isinstance(results, tuple) else (results,)
        return results[: len(self.contract.outputs)]

    def backward(
        self,
        grads: tuple[torch.Tensor | None, ...],
        named: dict[str, torch.Tensor | None],
        params: Any,
        needs: tuple[str, ...],
        implementation: str | None,
    ) -> list[torch.Tensor]:
        """Choose an implementation and run its backward alone, of a forward that was run elsewhere.

        grads: one for each output, None where nothing flows back. named: every input and output by its name. needs:
        the inputs whose gradients are returned, in the contract's order.
        """
        names = self.contract.input_names
        tensors = tuple(named[each] for each in names)
        call = replace(self._describe(tensors, params, needs_grad=True), backward_alone=True)
        chosen = self.choose(call, implementation)
        wanted = tuple(each in needs for each in names)
        return self._registered[chosen.name].backward(grads, named, wanted, params)

    def refuses(self, implementation: Implementation, call: Call) -> str | None:
        """None if `implementation` takes the call, else the reason why it does not."""
        reason = self.refuses_machine(implementation, call.device)
        if reason is not None:
            return reason
        module = self._registered[implementation.name].module
        if call.backward_alone and module.AUXILIARY:
            return f"needs {', '.join(module.AUXILIARY)} of its own forward"
        return module.refuses(call)

    def refuses_machine(self, implementation: Implementation, device: Device) -> str | None:
        """None if `implementation` runs on the device and its packages are installed, else the reason."""
        missing = self._missing[implementation.name]
        if missing:
            return f"needs the package {missing}, which is not installed"
        return implementation.refuses_machine(device)

    def reasons(self, call: Call) -> dict[str, str | None]:
        """For every implementation: None if it takes the call, else why it refuses."""
        return {each.name: self.refuses(each, call) for each in self.implementations}

    def choose(self, call: Call, implementation: str | None = None) -> Implementation:
        """The implementation that runs: the one named, or ("auto" or None) the first that takes the call.

        Raises UnsupportedError if the one named refuses, or if on a GPU every fast one does.
        """
        if implementation is not None and implementation != "auto":
            return self._choose_named(call, implementation)
        if call.device.type == "cpu":
            return self._choose_named(call, "reference")
        refusals = []
        for candidate in self.implementations:
            if candidate.name == "reference":
                continue
            reason = self.refuses(candidate, call)
            if reason is None:
                return candidate
            refusals.append(f"\n  {candidate.name}: {reason}")
        raise UnsupportedError(
            f"{self.contract.op}: no fast implementation takes this call:{''.join(refusals)}\n"
            "  implementation='reference' runs it in plain torch, slowly"
        )

    def _choose_named(self, call: Call, name: str) -> Implementation:
        names = [each.name for each in self.implementations]
        if name not in names:
            close = difflib.get_close_matches(name, names, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            listed = ", ".join(repr(each) for each in ["auto", *names])
            raise UnsupportedError(f"{self.contract.op}: implementation={name!r} is not one of {listed}{hint}")
        chosen = self.implementations[names.index(name)]
        reason = self.refuses(chosen, call)
        if reason:
            raise UnsupportedError(f"{self.contract.op}: implementation={name!r} cannot take this call: {reason}")
        return chosen

    def _choose_again(
        self, tensors: tuple, params: Any, needs_grad: bool, implementation: str | None
    ) -> Implementation:
        """`choose`, remembered by all that it depends on: asking takes several times as long as looking it up."""
        specs = tuple([None if t is None else (t.shape, t.dtype, t.stride()) for t in tensors])
        key = (Device.of(_first(tensors).device), specs, params, needs_grad, implementation, interpreting())
        chosen = self._choices.get(key)
        if chosen is None:
            chosen = self.choose(self._describe(tensors, params, needs_grad), implementation)
            if len(self._choices) >= _MOST_CHOICES:
                self._choices.clear()
            self._choices[key] = chosen
        return chosen

    def _describe(self, tensors: tuple[torch.Tensor | None, ...], params: Any, needs_grad: bool) -> Call:
        specs = {
            name: None if tensor is None else TensorSpec.of(tensor)
            for name, tensor in zip(self.contract.input_names, tensors, strict=True)
        }
        return Call(Device.of(_first(tensors).device), specs, params, needs_grad)


def _first(tensors: tuple[torch.Tensor | None, ...]) -> torch.Tensor:
    return next(tensor for tensor in tensors if tensor is not None)


_MOST_CHOICES = 4096  # of one op: packed batches have new shapes at each step
_OPS: dict[str, Op] = {}


def ops() -> dict[str, Op]:
    """Every op of the package by name."""
    importlib.import_module("tilestack.kernels")
    return dict(_OPS)


def _missing(packages: tuple[str, ...]) -> str:
    return ", ".join(name for name in packages if not _is_installed(name))


def _is_installed(name: str) -> bool:
    """Whether a module can be found, without importing the packages that it lies in, as find_spec would."""
    root, *inner = name.split(".")
    spec = importlib.util.find_spec(root)
    for index in range(len(inner)):
        if spec is None:
            break
        path = spec.submodule_search_locations or ()
        spec = importlib.machinery.PathFinder.find_spec(".".join([root, *inner[: index + 1]]), path)
    return spec is not None
