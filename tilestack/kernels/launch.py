"""Small helpers around launching Triton kernels."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import operator
import threading
import warnings
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from triton import AsyncCompileMode
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from tilestack.kernels._gluon import TensorDescriptor

_NOTHING_TO_DO = contextlib.nullcontext()
_COMPILED: dict[tuple, tuple[Any, tuple]] = {}
_IS_AMD = torch.version.hip is not None  # for which Triton also looks at how large a tensor is


class _Here(threading.local):
    waiting: list[tuple] | None = None  # launches of the function of `together` that this thread is in


_HERE = _Here()


def on_device(tensor: torch.Tensor) -> contextlib.AbstractContextManager:
    """Make the tensor's GPU the current one while a kernel is launched: Triton launches on the current device."""
    is_elsewhere = tensor.is_cuda and tensor.device.index != torch.cuda.current_device()
    return torch.cuda.device(tensor.device) if is_elsewhere else _NOTHING_TO_DO


def together(host: Callable) -> Callable:
    """Of a host function that launches several kernels: those that it launches for the first time are compiled at once.

    From the first of them on, launches wait for the function's end: nothing else in it may read what they write, and
    all their tensors stay in memory until then; so it is in any call with a kind of argument that is new. Its first
    argument is a tensor on the GPU that it launches on.
    """

    @functools.wraps(host)
    def launching(first: torch.Tensor, *args: Any, **options: Any) -> Any:
        if _HERE.waiting is not None:  # called by another one
            return host(first, *args, **options)
        with on_device(first):
            _HERE.waiting = waiting = []
            try:
                results = host(first, *args, **options)
            finally:
                _HERE.waiting = None
            if len(waiting) > 1:
                contextvars.Context().run(_compile, waiting)  # Triton's mode stays in it, whatever happens
            waiting.reverse()
            while waiting:  # what is launched no longer keeps its tensors
                kernel, grid, arguments, constants = waiting.pop()
                run(kernel, grid, *arguments, **constants)
        return results

    return launching


def _compile(launches: list[tuple]) -> None:
    """Compile what the launches need and do not find, each in a thread. What fails is left to the launch to raise."""
    # Triton 3.6 sets and restores the process's filters of warnings in each thread, in any order
    filters = warnings.catch_warnings()
    with filters, _Compilers(len(launches)) as pool, AsyncCompileMode(pool, ignore_errors=True):
        for kernel, grid, args, options in launches:
            kernel.warmup(*args, grid=grid, **options)


class _Compilers(ThreadPoolExecutor):
    """Threads that compile a kernel and, because Triton 3.6 has it in C, the function that launches it.

    That one is thrown away: loaded by another thread meanwhile, it may hold another kernel's.
    """

    def submit(self, compile_kernel: Callable[[], Any]) -> Future:
        def compile_both() -> Any:
            compiled = compile_kernel()
            driver.active.launcher_cls(compiled.src, compiled.metadata)  # the launch finds it on the disk
            return compiled

        return super().submit(compile_both)


def run(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """kernel[grid](*args, **options), which from the second launch of its kind on does not ask Triton what to run.

    args: the kernel's arguments up to its constants. options: the constants, num_warps and the like.
    """
    key, waiting = _key(kernel, args, options), _HERE.waiting
    found = _COMPILED.get(key)
    if waiting or (waiting is not None and found is None and key is not None):
        waiting.append((kernel, grid, args, options))
    elif found is not None:
        compiled, constants = found
        compiled[(*grid, 1, 1)[:3]](*args, *constants)
    else:
        compiled = kernel[grid](*args, **options)
        if key is not None and isinstance(compiled, CompiledKernel):  # in the interpreter None, or not there yet
            _COMPILED[key] = compiled, tuple([options[name] for name in kernel.arg_names[len(args) :]])


class Prepared:
    """Launches on one device that differ in their tensors alone: grid, numbers and constants are looked at once.

    The tensors are the kernel's first arguments, the numbers follow.
    """

    def __init__(self, grid: tuple[int, ...], *numbers: Any, **options: Any):
        self.grid, self.numbers, self.options = grid, numbers, options
        self._found: dict[tuple, tuple] = {}

    def run(self, kernel: Any, *tensors: Any) -> None:
        """launch.run(kernel, grid, *tensors, *numbers, **options)."""
        try:
            kinds = tuple([_KINDS[type(each)](each) for each in tensors])
        except KeyError:  # a tensor of another class
            kinds = None
        found = self._found.get(kinds)
        if found is not None and found[0] is kernel and not _HERE.waiting:
            _, compiled, rest = found
            compiled[(*self.grid, 1, 1)[:3]](*tensors, *rest)
            return
        args = (*tensors, *self.numbers)
        run(kernel, self.grid, *args, **self.options)
        found = _COMPILED.get(_key(kernel, args, self.options))
        if kinds is not None and found is not None:
            self._found[kinds] = kernel, found[0], (*self.numbers, *found[1])


def _key(kernel: Any, args: tuple, options: dict[str, Any]) -> tuple | None:
    """All that decides which compiled kernel a launch is, None where that is not known."""
    if _IS_AMD or not isinstance(kernel, JITFunction):  # in the interpreter it is none
        return None
    try:
        kinds = [_KINDS[type(each)](each) for each in args]
    except KeyError:  # a tensor of another class
        return None
    return kernel, torch.cuda.current_device(), *kinds, *options, *options.values()


def _kind_of_integer(value: int) -> Hashable:
    if -(2**31) <= value < 2**31:
        return 1 if value == 1 else 16 if value % 16 == 0 else 3
    return value >= 2**63, value % 16 == 0


def _kind_of_tensor(tensor: torch.Tensor) -> Hashable:
    return tensor.dtype if tensor.data_ptr() % 16 == 0 else (tensor.dtype,)


# What the compiler is told of an argument: that it is 1 or a multiple of 16 decides what it makes of it.
_KINDS: dict[type, Callable[[Any], Hashable]] = {
    int: _kind_of_integer,
    bool: type,
    float: type,
    type(None): type,
    torch.Tensor: _kind_of_tensor,
    torch.nn.Parameter: _kind_of_tensor,
    TensorDescriptor: operator.attrgetter("kind"),
}


def multiprocessors(tensor: torch.Tensor) -> int:
    """Multiprocessors of the tensor's GPU; 4 in the interpreter, so that persistent loops run more than once."""
    return _multiprocessors(tensor.device.index) if tensor.is_cuda else 4


@functools.cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def rows(tensor: torch.Tensor) -> torch.Tensor:
    """View (or, where strides forbid it, copy) [..., H] as [rows, H] whose last dimension is contiguous."""
    flat = tensor.reshape(-1, tensor.shape[-1])
    return flat if flat.stride(-1) == 1 or flat.shape[-1] == 1 else flat.contiguous()


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)  # triton.cdiv is for kernels, and takes ten microseconds


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length() if n > 0 else 0
