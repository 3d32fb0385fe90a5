"""Turns an implementation into a pair of torch custom ops with fake kernels and autograd.

A module that implements an op has:

    AUXILIARY: tuple[str, ...]       what `forward` returns after the op's outputs, for its own backward alone
    SAVED: tuple[str, ...]           the inputs, outputs and auxiliaries that backward reads; nothing else is kept.
                                     "a|b" stands for a where the call has it, else for b
    forward(*inputs, params)         -> (*outputs, *auxiliaries)
    backward(*grads, *saved, needs, params)
                                     -> one gradient for each name in `needs`, in the contract's order of inputs.
                                     grads: one for each output, None where nothing flows back; saved: in SAVED's
                                     order; needs: the inputs whose gradient is wanted
    refuses(call)                    -> None, or why it does not take the call
    fake_auxiliary(*inputs, params)  -> empty tensors shaped like the auxiliaries (only if AUXILIARY is not empty)

It becomes tilestack::<op>_forward_<suffix> and tilestack::<op>_backward_<suffix>, so torch.compile and a profile
name what runs. Non-tensor arguments travel in one frozen dataclass, which is spelled out in the op's schema.

An op that updates its inputs (InPlaceContract) has no gradient: its modules have `refuses` and

    update(*inputs, params)          -> None; writes the inputs that the contract names

and become one custom op, tilestack::<op>_<suffix>.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch.compiler import is_compiling

NAMESPACE = "tilestack"
_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")
_SCHEMA_TYPES = {"int": "int", "float": "float", "bool": "bool", "str": "str"}


@dataclass(frozen=True)
class Contract:
    """What every implementation of an op agrees on.

    op: its name.
    inputs: names of the tensor arguments in order; a "?" at the end marks one that may be None.
    outputs: names of the tensors returned. One that does not exist for a call is an empty tensor of shape [0].
    params: frozen dataclass of int, float, bool and str fields: everything that is not a tensor.
    fake: (*inputs, params) -> one tensor for each output with the right shape, dtype and device, content undefined.
    gradient_like: for an input whose gradient has another tensor's shape and dtype when the input itself is not
        saved, the name of that saved tensor.
    gradient_dtypes: for an input whose gradient has not the dtype of that tensor either, the field of params that
        names it ("float32").
    constants: outputs that no gradient flows through; if all are, the op has no backward.
    shared_gradients: pairs of inputs whose gradients are equal, as of the terms of a sum. `backward` is asked for the
        second alone where both are wanted: a custom op must not return a tensor twice, and autograd may.
    """

    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    params: type
    fake: Callable[..., tuple[torch.Tensor, ...]]
    gradient_like: tuple[tuple[str, str], ...] = ()
    gradient_dtypes: tuple[tuple[str, str], ...] = ()
    constants: tuple[str, ...] = ()
    shared_gradients: tuple[tuple[str, str], ...] = ()

    @functools.cached_property
    def input_names(self) -> tuple[str, ...]:
        return tuple(name.rstrip("?") for name in self.inputs)

    @property
    def differentiable(self) -> bool:
        """False if every output is constant: such an op has no backward."""
        return set(self.outputs) != set(self.constants)


@dataclass(frozen=True)
class InPlaceContract:
    """What every implementation agrees on of an op that writes into its inputs and returns nothing.

    op, inputs, params: as in Contract.
    mutates: the names of the inputs that are written.
    """

    op: str
    inputs: tuple[str, ...]
    mutates: tuple[str, ...]
    params: type

    @functools.cached_property
    def input_names(self) -> tuple[str, ...]:
        return tuple(name.rstrip("?") for name in self.inputs)

    @property
    def outputs(self) -> tuple[str, ...]:
        return ()


@dataclass(frozen=True)
class Registered:
    """An implementation's module and the custom ops made from it."""

    module: ModuleType
    forward_op: Any
    params_fields: tuple[str, ...]
    eager: type[torch.autograd.Function] | None = None
    backward_op: Any = None

    def __call__(
        self, tensors: tuple[torch.Tensor | None, ...], params: Any, needs_grad: bool
    ) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """Run it. needs_grad: autograd must record the call."""
        # The autograd that torch puts around a custom op takes 200 microseconds a call. Ours stands outside of the op,
        # with the same functions; what traces the op itself finds torch's.
        if not needs_grad or self.eager is None or is_compiling():
            return self.forward_op(*tensors, *_values(params, self.params_fields))
        return self.eager.apply(*tensors, params)

    def backward(
        self,
        grads: tuple[torch.Tensor | None, ...],
        named: dict[str, torch.Tensor | None],
        needs: tuple[bool, ...],
        params: Any,
    ) -> list[torch.Tensor]:
        """Run backward alone: grads one for each output, named the inputs and outputs, needs one for each input."""
        saved = [_pick(named, each) for each in self.module.SAVED]
        return self.backward_op(list(grads), saved, list(needs), *_values(params, self.params_fields))


def register(contract: Contract | InPlaceContract, suffix: str, module_path: str) -> Registered:
    """Import an implementation and register its custom ops; once per implementation and process."""
    module = importlib.import_module(module_path)
    fields = tuple(field.name for field in dataclasses.fields(contract.params))
    if isinstance(contract, InPlaceContract):
        name = f"{contract.op}_{suffix}"
        _define_in_place(contract, module, name)
        return Registered(module, _overload(name), fields)
    forward_name = f"{contract.op}_forward_{suffix}"
    backward_name = f"{contract.op}_backward_{suffix}"
    backward_op = None
    if contract.differentiable:
        _define_backward(contract, module, backward_name)
        backward_op = _overload(backward_name)
        eager = _define_forward(contract, module, forward_name, backward_op)
    else:
        eager = _define_forward(contract, module, forward_name)
    return Registered(module, _overload(forward_name), fields, eager, backward_op)


def _overload(name: str) -> Any:
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def _values(params: Any, fields: Sequence[str]) -> list[Any]:
    """The parameters as an op's schema has them."""
    return [getattr(params, name) for name in fields]


def _params_schema(contract: Contract | InPlaceContract) -> str:
    kinds = {field.name: str(field.type) for field in dataclasses.fields(contract.params)}
    return "".join(f", {_SCHEMA_TYPES[kind]} {name}" for name, kind in kinds.items())


def _define(name: str, schema: str, kernel: Callable, fake: Callable) -> None:
    _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)


def _define_forward(
    contract: Contract, module: ModuleType, name: str, backward_op: Any = None
) -> type[torch.autograd.Function] | None:
    """Defines the forward op; returns its autograd for eager calls, None where nothing is differentiable."""
    n_inputs = len(contract.inputs)
    n_results = len(contract.outputs) + len(module.AUXILIARY)
    arguments = ", ".join(f"Tensor{'?' if n.endswith('?') else ''} {n.rstrip('?')}" for n in contract.inputs)
    schema = f"({arguments}{_params_schema(contract)}) -> ({', '.join(['Tensor'] * n_results)})"
    params_of = _remembering(contract.params)

    def kernel(*args: Any) -> Any:
        return _unwrap(module.forward(*args[:n_inputs], params_of(*args[n_inputs:])))

    def fake(*args: Any) -> Any:
        inputs, params = args[:n_inputs], contract.params(*args[n_inputs:])  # values may be symbols
        results = contract.fake(*inputs, params)
        if module.AUXILIARY:
            results = (*results, *module.fake_auxiliary(*inputs, params))
        return _unwrap(results)

    _define(name, schema, kernel, fake)
    if not contract.differentiable:
        return None
    keep, gradients = _autograd(contract, module)

    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        keep(ctx, inputs[:n_inputs], output)
        ctx.values = inputs[n_inputs:]

    def backward_of_op(ctx: Any, *grads: torch.Tensor | None) -> tuple:
        found = gradients(ctx, grads, lambda each, saved, flags, _: backward_op(each, saved, flags, *ctx.values))
        return (*found, *[None] * len(ctx.values))

    torch.library.register_autograd(f"{NAMESPACE}::{name}", backward_of_op, setup_context=setup_context, lib=_LIBRARY)
    return _eager_autograd(contract, module, name, backward_op)


def _autograd(contract: Contract, module: ModuleType) -> tuple[Callable, Callable]:
    """(keep, gradients): what a recorded forward keeps in its context, and the gradients of its inputs.

    `gradients` is given what runs backward: (grads, saved, flags of the inputs whose gradients are computed, their
    names) -> these gradients. All that depends on the contract alone is worked out here, once: these run at every call.
    """
    n_inputs, n_outputs = len(contract.inputs), len(contract.outputs)
    names = (*contract.input_names, *contract.outputs, *module.AUXILIARY)
    places = {each: index for index, each in enumerate(names)}
    saved = [[places[each] for each in key.split("|")] for key in module.SAVED]
    always_constant = [each in contract.constants or each in module.AUXILIARY for each in names[n_inputs:]]

    def keep(ctx: Any, tensors: Sequence, output: Any) -> None:
        results = output if isinstance(output, tuple) else (output,)
        every = (*tensors, *results)
        ctx.save_for_backward(*[_first_given([every[place] for place in each]) for each in saved])
        # an output that does not exist for this call has shape [0]; nothing may flow back from it
        constants = [
            result
            for index, result in enumerate(results)
            if always_constant[index] or (index < n_outputs and result.shape == (0,) and tensors[0].numel())
        ]
        ctx.mark_non_differentiable(*constants)
        ctx.set_materialize_grads(False)

    @functools.cache
    def order(needed: tuple[bool, ...]) -> tuple[list[bool], tuple[str, ...], list[int | None]]:
        """Which gradients are computed, as flags and by name, and for each input which of them is its own."""
        by_name = dict(zip(contract.input_names, needed, strict=True))
        twins = {name: other for name, other in contract.shared_gradients if by_name[name] and by_name[other]}
        computed = [name for name in contract.input_names if by_name[name] and name not in twins]
        index = {name: place for place, name in enumerate(computed)}
        flags, of_input = [name in index for name in by_name], [index.get(twins.get(name, name)) for name in by_name]
        return flags, tuple(computed), of_input

    def gradients(ctx: Any, grads: tuple[torch.Tensor | None, ...], run: Callable) -> tuple:
        outputs = list(grads[:n_outputs])
        if all(grad is None for grad in outputs):
            return (None,) * n_inputs
        flags, wanted, of_input = order(tuple(ctx.needs_input_grad[:n_inputs]))
        found = run(outputs, list(ctx.saved_tensors), flags, wanted)
        return tuple([None if place is None else found[place] for place in of_input])

    return keep, gradients


def _eager_autograd(
    contract: Contract, module: ModuleType, name: str, backward_op: Any
) -> type[torch.autograd.Function]:
    forward_op, fields = _overload(name), [field.name for field in dataclasses.fields(contract.params)]
    keep, gradients = _autograd(contract, module)

    def forward(ctx: Any, *args: Any) -> Any:
        *tensors, params = args
        if _nobody_looks(tensors):
            output = _unwrap(module.forward(*tensors, params))
        else:
            with torch._C._AutoDispatchBelowAutograd():
                output = forward_op(*tensors, *_values(params, fields))
        keep(ctx, tensors, output)
        ctx.params = params
        return output

    def backward_of_call(ctx: Any, *grads: torch.Tensor | None) -> tuple:
        def run(outputs: list, saved: list, flags: list[bool], wanted: tuple[str, ...]) -> Sequence[torch.Tensor]:
            if _nobody_looks((*outputs, *saved)):
                return module.backward(*outputs, *saved, needs=wanted, params=ctx.params)
            return backward_op(outputs, saved, flags, *_values(ctx.params, fields))

        return (*gradients(ctx, grads, run), None)

    functions = {"forward": staticmethod(forward), "backward": staticmethod(backward_of_call)}
    return type(name, (torch.autograd.Function,), functions)


_PLAIN = (torch.Tensor, torch.nn.Parameter)


def _nobody_looks(tensors: Sequence[torch.Tensor | None]) -> bool:
    """Whether an op would be seen by nobody: no profiler, no mode of torch, no tensor of another class, no second
    derivative. Then what is in the op is called without torch's dispatcher, which saves its time."""
    return not (
        torch.is_grad_enabled()
        or torch.autograd._profiler_enabled()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or [each for each in tensors if each is not None and type(each) not in _PLAIN]
    )


def _remembering(params: type) -> Callable:
    """The dataclass, made once for the same values: a frozen one takes microseconds to make."""
    return functools.lru_cache(maxsize=256, typed=True)(params)


def _define_backward(contract: Contract, module: ModuleType, name: str) -> None:
    schema = f"(Tensor?[] grads, Tensor?[] saved, bool[] needs{_params_schema(contract)}) -> Tensor[]"
    params_of = _remembering(contract.params)

    def wanted(needs: list[bool]) -> tuple[str, ...]:
        return tuple([each for each, need in zip(contract.input_names, needs, strict=True) if need])

    def kernel(grads: list, saved: list, needs: list[bool], *params: Any) -> list[torch.Tensor]:
        gradients = module.backward(*grads, *saved, needs=wanted(needs), params=params_of(*params))
        return list(gradients)

    def fake(grads: list, saved: list, needs: list[bool], *values: Any) -> list[torch.Tensor]:
        params = contract.params(*values)
        dtypes = {name: getattr(torch, getattr(params, field)) for name, field in contract.gradient_dtypes}
        named = {name: tensor for key, tensor in zip(module.SAVED, saved, strict=True) for name in key.split("|")}
        like = dict(contract.gradient_like)
        templates = {each: named[each] if each in named else named[like[each]] for each in wanted(needs)}
        return [each.new_empty(each.shape, dtype=dtypes.get(name, each.dtype)) for name, each in templates.items()]

    _define(name, schema, kernel, fake)


def _define_in_place(contract: InPlaceContract, module: ModuleType, name: str) -> None:
    n_inputs = len(contract.inputs)
    written = [each in contract.mutates for each in contract.input_names]

    def argument(index: int, each: str) -> str:
        alias = f"({chr(ord('a') + index)}!)" if written[index] else ""
        return f"Tensor{alias}{'?' if each.endswith('?') else ''} {each.rstrip('?')}"

    arguments = ", ".join(argument(index, each) for index, each in enumerate(contract.inputs))

    def kernel(*args: Any) -> None:
        inputs, params = args[:n_inputs], contract.params(*args[n_inputs:])
        module.update(*inputs, params)
        # autograd must see the write even where a kernel made it behind torch's back
        torch.autograd.graph.increment_version(
            [each for each, is_written in zip(inputs, written, strict=True) if is_written and each is not None]
        )

    def fake(*args: Any) -> None:
        return None

    _define(name, f"({arguments}{_params_schema(contract)}) -> ()", kernel, fake)


def _pick(named: dict[str, torch.Tensor | None], key: str) -> torch.Tensor | None:
    return _first_given([named[name] for name in key.split("|")])


def _first_given(tensors: list[torch.Tensor | None]) -> torch.Tensor | None:
    """The first that is there and not empty, else the last."""
    *preferred, last = tensors
    for tensor in preferred:
        if tensor is not None and tensor.numel():
            return tensor
    return last


def _unwrap(results: tuple[torch.Tensor, ...]) -> Any:
    return results[0] if len(results) == 1 else tuple(results)
