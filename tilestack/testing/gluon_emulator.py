"""Runs Hopper Gluon kernels on the CPU: the very functions that are compiled for the GPU, over torch tensors.

Each partition of a warp-specialised kernel is a thread, of which one runs at a time; it goes on until it waits, and
then the others go as far as they can. What the hardware may do late is late here:

* TMA loads and cp.async fill their buffer with NaN when issued, and with data only when somebody waits at their
  mbarrier;
* who reads a buffer into registers does so after the others have gone as far as they can;
* wgmma runs only at its wait, after every other partition has gone as far as it can: who releases a buffer too early is
  overtaken;
* TMA stores and reductions read their buffer as late as their wait allows;
* what a partition stores into shared memory is there for wgmma and TMA only after its next fence_async_shared;
* shared memory is NaN until it is written.

A missing wait, an early release, a forgotten arrival, a store that overtakes: each shows as NaN, wrong numbers, a
DeadlockError or a ProtocolError, and the same `seed` shows it again. Not modelled: layouts, bank conflicts, fences
between global memory and TMA, and races between the warpgroups of one partition, which is one thread here.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import random
import threading
import types
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from triton.language import constexpr
from triton.runtime.jit import JITFunction

from tilestack.kernels import _gluon


class DeadlockError(AssertionError):
    """Every partition waits for another."""


class ProtocolError(AssertionError):
    """A barrier or queue was used in a way that the hardware does not survive."""


class Scheduler:
    """Runs partitions as threads, one at a time, in an order that depends on the seed alone."""

    def __init__(self, seed: int):
        self.random = random.Random(seed)
        self.changed = threading.Condition()
        self.here = threading.local()
        self.ready: dict[int, tuple[Callable[[], bool], str]] = {}
        self.turn: int | None = None
        self.failure: BaseException | None = None

    def run(self, bodies: list[Callable[[], None]]) -> None:
        """Run every body to its end; raises the first failure."""
        self.ready = {number: (lambda: True, "its start") for number in range(len(bodies))}
        self.failure = None
        threads = [threading.Thread(target=self._thread, args=each, daemon=True) for each in enumerate(bodies)]
        for thread in threads:
            thread.start()
        with self.changed:
            self._pass_on()
        for thread in threads:
            thread.join()
        if self.failure:
            raise self.failure

    def wait(self, until: Callable[[], bool], what: str, others_first: bool = False) -> None:
        """Let others run until `until()`; others_first: until they have gone as far as they can."""
        me = getattr(self.here, "number", None)
        if me is None:  # outside warp_specialize there is nobody else
            if not until():
                raise DeadlockError(f"waits for {what}")
            return
        with self.changed:
            self.ready[me] = (until, what)
            self._pass_on(last=me if others_first else None)
            self.changed.wait_for(lambda: self.turn == me or self.failure)
            if self.failure:
                raise self.failure
            del self.ready[me]

    def _thread(self, number: int, body: Callable[[], None]) -> None:
        self.here.number = number
        with self.changed:
            self.changed.wait_for(lambda: self.turn == number or self.failure)
            del self.ready[number]
        try:
            if not self.failure:
                body()
        except BaseException as failure:  # raised again by `run`
            self.failure = self.failure or failure
        with self.changed:
            self._pass_on()

    def _pass_on(self, last: int | None = None) -> None:
        try:
            runnable = [number for number, (until, _) in self.ready.items() if until()]
        except BaseException as failure:  # a transfer that ends here went wrong; raised again by `run`
            self.failure, runnable = self.failure or failure, []
        if last in runnable and len(runnable) > 1:
            runnable.remove(last)
        self.turn = self.random.choice(runnable) if runnable else None
        if self.ready and not runnable and not self.failure:
            waits = "; ".join(f"partition {number} waits for {what}" for number, (_, what) in self.ready.items())
            self.failure = DeadlockError(waits)
        self.changed.notify_all()


class Mbarrier:
    """One mbarrier: arrivals and bytes due in the current phase, transfers under way, and how many phases are done."""

    def __init__(self, scheduler: Scheduler):
        self.scheduler = scheduler
        self.expected = self.arrived = self.bytes = self.phases = 0
        self.transfers: list[Callable[[], None]] = []  # each ends when somebody waits here

    def arrive(self, count: int = 1, new_bytes: int = 0) -> None:
        self.arrived += count
        self.bytes += new_bytes
        if self.arrived > self.expected:
            raise ProtocolError(f"mbarrier: {self.arrived} arrivals, {self.expected} expected")
        self._complete()

    def received(self, n_bytes: int) -> None:
        self.bytes -= n_bytes
        self._complete()

    def _complete(self) -> None:
        if self.arrived == self.expected and self.bytes == 0:
            self.arrived = 0
            self.phases += 1

    def wait(self, parity: int) -> None:
        def done() -> bool:
            while self.phases & 1 == parity and self.transfers:
                self.transfers.pop(0)()
            return self.phases & 1 != parity

        self.scheduler.wait(done, f"parity {parity} of an mbarrier")

    def check_idle(self) -> None:
        if self.transfers or self.arrived or self.bytes:
            raise ProtocolError(
                f"mbarrier at the end: {len(self.transfers)} transfers nobody waited for, {self.arrived} arrivals and "
                f"{self.bytes} bytes of an unfinished phase"
            )


class Mbarriers:
    """An array of mbarriers in shared memory."""

    def __init__(self, count: int, scheduler: Scheduler):
        self.items = [Mbarrier(scheduler) for _ in range(count)]

    def index(self, i: Any) -> Mbarrier:
        return self.items[int(i)]


class Proxy:
    """What each partition has stored into shared memory since its last fence: wgmma and TMA of any may miss it."""

    def __init__(self):
        self.stored: dict[int, list[range]] = collections.defaultdict(list)  # by the partition's thread

    def store(self, data: torch.Tensor) -> None:
        self.stored[threading.get_ident()].append(_bytes(data))

    def fence(self, **_: Any) -> None:
        self.stored[threading.get_ident()].clear()

    def read(self, data: torch.Tensor, who: str) -> None:
        where = _bytes(data)
        for each in itertools.chain(*self.stored.values()):
            if each.start < where.stop and where.start < each.stop:
                raise ProtocolError(f"{who} reads what was stored without fence_async_shared")


def _bytes(data: torch.Tensor) -> range:
    extent = sum((size - 1) * stride for size, stride in zip(data.shape, data.stride(), strict=True)) + 1
    return range(data.data_ptr(), data.data_ptr() + extent * data.element_size())


class Shared:
    """A buffer in shared memory, or a view of one."""

    def __init__(self, data: torch.Tensor, scheduler: Scheduler, proxy: Proxy):
        self.data = data
        self.scheduler = scheduler
        self.proxy = proxy
        self.dtype = data.dtype
        self.shape = list(data.shape)
        self.type = SimpleNamespace(shape=self.shape)

    def _view(self, data: torch.Tensor) -> Shared:
        return Shared(data, self.scheduler, self.proxy)

    def index(self, i: Any) -> Shared:
        return self._view(self.data[int(i)])

    def slice(self, start: Any, length: int, dim: int = 0) -> Shared:
        return self._view(self.data.narrow(dim, int(start), length))

    def permute(self, order: tuple[int, ...]) -> Shared:
        return self._view(self.data.permute(order))

    def store(self, value: torch.Tensor) -> None:
        if value.dtype != self.dtype:
            raise ProtocolError(f"store of {value.dtype} into shared memory of {self.dtype}")
        self.data.copy_(value)
        self.proxy.store(self.data)

    def load(self, layout: Any = None) -> torch.Tensor:
        self.scheduler.wait(lambda: True, "its load", others_first=True)
        return self.data.clone()

    def reinterpret(self, dtype: torch.dtype, shape: list[int], layout: Any = None) -> Shared:
        count = torch.Size(shape).numel()
        return self._view(self.data.reshape(-1).view(dtype)[:count].view(shape))

    _reinterpret = reinterpret


class Pointer:
    """A pointer, or a tensor of pointers, into a flat tensor."""

    def __init__(self, memory: torch.Tensor, offset: Any = 0):
        self.memory = memory
        self.offset = offset
        self.dtype = SimpleNamespace(element_ty=memory.dtype)

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.memory, self.offset + offset)

    __radd__ = __add__

    def __getitem__(self, key: Any) -> Pointer:
        return Pointer(self.memory, self.offset[key])


class Descriptor:
    """A TMA descriptor."""

    def __init__(self, host: Any):
        self.tensor = host.base.as_strided(host.shape, host.strides)
        self.block = list(host.block_shape)
        self.block_shape = self.block
        self.dtype = host.base.dtype
        self.layout = None
        nbytes = torch.Size(self.block).numel() * host.base.element_size()
        self.block_type = SimpleNamespace(nbytes=nbytes, shape=self.block)

    def tile(self, coord: list[Any]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        """Slices of the tensor and of the tile that overlap; TMA reads zeros and drops writes outside."""
        inside, within = [], []
        for start, size, limit in zip(map(int, coord), self.block, self.tensor.shape, strict=True):
            low, high = max(start, 0), min(start + size, limit)
            inside.append(slice(low, max(low, high)))
            within.append(slice(low - start, max(low, high) - start))
        return tuple(inside), tuple(within)


class Accumulator:
    """The result of an asynchronous wgmma: it has a value only once it has run."""

    def __init__(self, value: torch.Tensor | None = None):
        self.value = value


class Emulator:
    """Launches Gluon kernels on the CPU; `seed` decides the order in which partitions run."""

    def __init__(self, seed: int = 0):
        self.scheduler = Scheduler(seed)
        self.proxy = Proxy()
        self.here = threading.local()
        self.rebuilt: dict[JITFunction, Callable] = {}
        self.named: dict[int, list[int]] = {}
        self.mbarriers: list[Mbarrier] = []
        self.reversed = False  # the order of the programs
        self.fakes = self._fakes()

    def launcher(self, kernel: JITFunction) -> Any:
        """What stands in for `kernel` in a host function: launcher(kernel)[grid](...) runs it here."""
        emulator = self

        class Launcher:
            def __getitem__(self, grid: tuple[int, ...]) -> Callable:
                return lambda *args, **options: emulator.launch(kernel, grid, *args, **options)

        return Launcher()

    def launch(self, kernel: JITFunction, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        """Run every program of the grid, one after the other."""
        function = self.rebuild(kernel)
        named = dict(zip(kernel.arg_names, args, strict=False))
        named.update({name: value for name, value in options.items() if name in kernel.arg_names})
        arguments = [self._argument(named[name]) for name in kernel.arg_names]
        self.grid = (*grid, 1, 1)[:3]
        warps = options.get("num_warps", 4)
        programs = [(x, y, z) for z, y, x in itertools.product(*map(range, reversed(self.grid)))]
        for program in reversed(programs) if self.reversed else programs:
            self.named.clear()
            self.mbarriers.clear()
            self.proxy.stored.clear()
            with self._partition(program, warps):
                function(*arguments)
            if any(count for count, _ in self.named.values()):
                raise ProtocolError("a named barrier was left half full")
            for barrier in self.mbarriers:
                barrier.check_idle()

    def rebuild(self, jitted: JITFunction) -> Callable:
        """The Python function behind a JIT function, with the emulator's versions of what it calls."""
        if jitted not in self.rebuilt:
            source = jitted.fn
            names: dict[str, Any] = {}
            function = types.FunctionType(source.__code__, names, source.__name__, source.__defaults__)
            self.rebuilt[jitted] = function
            for name, value in source.__globals__.items():
                names[name] = self._replacement(value)
        return self.rebuilt[jitted]

    def _replacement(self, value: Any) -> Any:
        with contextlib.suppress(TypeError):
            if value in self.fakes:
                return self.fakes[value]
        if isinstance(value, JITFunction):
            return lambda *args, **named: self.rebuild(value)(*args, **named)
        return value.value if isinstance(value, constexpr) else value

    def _argument(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            behind = value.untyped_storage().nbytes() // value.element_size() - value.storage_offset()
            return Pointer(value.as_strided((behind,), (1,)))  # a kernel may step out of a view, by its strides
        return Descriptor(value) if hasattr(value, "block_shape") else value

    @contextlib.contextmanager
    def _partition(self, program: tuple[int, int, int], warps: int) -> Iterator[None]:
        here = self.here
        here.program, here.warps, here.products, here.stores, here.copies = program, warps, [], [], []
        yield
        for what, queue in (("wgmma", here.products), ("TMA store", here.stores), ("cp.async", here.copies)):
            if queue:
                raise ProtocolError(f"{len(queue)} {what} left in flight at the end")

    # ---- partitions and barriers

    def warp_specialize(self, partitions: list, worker_warps: list[int], worker_registers: list[int]) -> None:
        program, all_warps = self.here.program, (self.here.warps, *worker_warps)

        def body(warps: int, function: Callable, args: tuple) -> None:
            with self._partition(program, warps):
                function(*args)

        each_of = zip(all_warps, partitions, strict=True)
        self.scheduler.run([lambda warps=warps, each=each: body(warps, *each) for warps, each in each_of])

    def barrier(self, index: Any, threads: str, num_warps: int, wait: bool) -> None:
        state = self.named.setdefault(int(index), [0, 0])  # threads that came, turns that are over
        state[0] += 32 * num_warps
        if state[0] > int(threads):
            raise ProtocolError(f"named barrier {index}: more than {threads} threads came")
        turn = state[1]
        if state[0] == int(threads):
            state[:] = 0, turn + 1
        if wait:
            self.scheduler.wait(lambda: state[1] != turn, f"named barrier {index}")

    def group_barrier(self, index: Any, threads: str, num_warps: int, wait: bool) -> None:
        for group in range(num_warps // 4):
            self.barrier(index + group, threads, 4, wait)

    # ---- copies

    def tma_load(
        self, desc: Descriptor, coord: list, barrier: Mbarrier | Mbarriers, target: Shared, pred: Any = True
    ) -> None:
        if not pred:
            return
        target.data.fill_(float("nan"))
        coord = [int(each) for each in coord]

        def arrive() -> None:
            inside, within = desc.tile(coord)
            tile = torch.zeros(desc.block, dtype=desc.dtype)
            tile[within] = desc.tensor[inside]
            target.data.copy_(tile.view(target.data.shape))
            _one(barrier).received(desc.block_type.nbytes)

        _one(barrier).transfers.append(arrive)

    def tma_store(self, desc: Descriptor, coord: list, source: Shared, add: bool = False) -> None:
        coord = [int(each) for each in coord]
        self.proxy.read(source.data, "TMA")

        def leave() -> None:
            inside, within = desc.tile(coord)
            tile = source.data.reshape(desc.block)[within]
            desc.tensor[inside] = desc.tensor[inside] + tile if add else tile

        self.here.stores.append(leave)

    def reduce_add(self, pointers: Pointer, values: torch.Tensor, num_warps: int) -> None:
        pointers.memory.index_put_((pointers.offset,), values, accumulate=True)

    def wait_for_turn(self, pointer: Pointer, turn: int, num_warps: int, reached: int = -1) -> None:
        memory, offset = pointer.memory, int(pointer.offset)
        if reached != int(turn):
            self.scheduler.wait(lambda: memory[offset] == int(turn), f"turn {turn}")

    def read_turn(self, pointer: Pointer, num_warps: int) -> int:
        return int(pointer.memory[int(pointer.offset)])

    def pass_turn(self, pointer: Pointer, num_warps: int) -> None:
        self.store_wait(0)
        pointer.memory[int(pointer.offset)] += 1

    def store_wait(self, pendings: int = 0) -> None:
        self.scheduler.wait(lambda: True, "its stores", others_first=True)
        while len(self.here.stores) > int(pendings):
            self.here.stores.pop(0)()

    def copy_async(self, target: Shared, pointer: Pointer, mask: torch.Tensor | None = None, **_: Any) -> None:
        target.data.fill_(float("nan"))
        offset = pointer.offset
        mask = torch.ones_like(offset, dtype=torch.bool) if mask is None else mask.expand_as(offset)
        zero = torch.zeros((), dtype=pointer.memory.dtype)

        def arrive() -> None:
            target.data.copy_(torch.where(mask, pointer.memory[torch.where(mask, offset, 0)], zero))

        self.here.copies.append(arrive)

    def copy_arrive(self, barrier: Mbarrier, increment_count: bool = True) -> None:
        if increment_count:
            raise ProtocolError("cp.async arrivals must be counted in the mbarrier's init (increment_count=False)")
        pending, self.here.copies = self.here.copies, []
        threads = 32 * self.here.warps

        def arrive() -> None:
            for copy in pending:
                copy()
            barrier.arrive(threads)

        barrier.transfers.append(arrive)

    def copy_wait(self, pendings: int = 0) -> None:
        while len(self.here.copies) > pendings:
            self.here.copies.pop(0)()

    # ---- products

    def mma(self, a: Any, b: Shared, acc: Any, *, use_acc: Any = True, is_async: bool = False, **_: Any) -> Any:
        result = Accumulator()
        for each in (a, b):
            if isinstance(each, Shared):
                self.proxy.read(each.data, "wgmma")

        def run() -> None:
            left = a.data if isinstance(a, Shared) else a
            product = left.float() @ b.data.float()
            before = acc.value if isinstance(acc, Accumulator) else acc
            result.value = product + before if use_acc else product

        self.here.products.append(run)
        if not is_async:
            self._drain(0)
        return result if is_async else result.value

    def mma_wait(self, num_outstanding: int = 0, deps: list | None = None) -> Any:
        self.scheduler.wait(lambda: True, "its products", others_first=True)
        self._drain(int(num_outstanding))
        values = [each.value if isinstance(each, Accumulator) and each.value is not None else each for each in deps]
        return values[0] if len(values) == 1 else tuple(values)

    def _drain(self, outstanding: int) -> None:
        while len(self.here.products) > outstanding:
            self.here.products.pop(0)()

    # ---- the names that kernels see

    def _fakes(self) -> dict[Any, Any]:
        return {
            _gluon.gl: self._language(),
            _gluon.tma: SimpleNamespace(
                async_copy_global_to_shared=self.tma_load,
                async_copy_shared_to_global=self.tma_store,
                store_wait=self.store_wait,
            ),
            _gluon.mbarrier: SimpleNamespace(
                MBarrierLayout=lambda: None,
                init=_init,
                expect=lambda barrier, nbytes, pred=True: _one(barrier).arrive(1, int(nbytes)) if pred else None,
                arrive=lambda barrier, count=1, pred=True: _one(barrier).arrive(count) if pred else None,
                wait=lambda barrier, phase, pred=True, deps=(): _one(barrier).wait(int(phase)) if pred else None,
            ),
            _gluon.async_copy: SimpleNamespace(
                async_copy_global_to_shared=self.copy_async,
                mbarrier_arrive=lambda barrier, increment_count=True: self.copy_arrive(_one(barrier), increment_count),
                wait_group=self.copy_wait,
            ),
            _gluon.warpgroup_mma: self.mma,
            _gluon.warpgroup_mma_init: Accumulator,
            _gluon.warpgroup_mma_wait: self.mma_wait,
            _gluon.fence_async_shared: self.proxy.fence,
            _gluon.thread_barrier: lambda: None,
            _gluon.tma_reduce_add: lambda desc, coord, source: self.tma_store(desc, coord, source, add=True),
            _gluon.barrier_sync: lambda index, threads, num_warps: self.barrier(index, threads, num_warps, True),
            _gluon.barrier_arrive: lambda index, threads, num_warps: self.barrier(index, threads, num_warps, False),
            _gluon.group_barrier_sync: lambda index, threads, warps: self.group_barrier(index, threads, warps, True),
            _gluon.group_barrier_arrive: lambda index, threads, warps: self.group_barrier(index, threads, warps, False),
            _gluon.narrow: lambda x, dtype: x.to(dtype),
            _gluon.widen: lambda x, dtype: x.float(),
            _gluon.reduce_add: self.reduce_add,
            _gluon.wait_for_turn: self.wait_for_turn,
            _gluon.read_turn: self.read_turn,
            _gluon.pass_turn: self.pass_turn,
            _gluon.reciprocal: lambda x: 1 / x,
            _gluon.partial_row_max: lambda x: x.reshape(x.shape[0], -1, 8).amax(1),
            _gluon.partial_row_sums: lambda x: x.reshape(x.shape[0], -1, 8).sum(1),
            _gluon.beside: lambda rows, partial: rows[:, None],
            _gluon.scale_rows: lambda x, factors: x * factors[:, None],
            _gluon.mask_rows: _mask_rows,
            _gluon.round_to_bf16: lambda x: (x.bfloat16(), x.bfloat16().float()),
        }

    def _allocate(self, dtype: torch.dtype, shape: list[int], layout: Any = None) -> Any:
        if dtype == torch.int64:
            barriers = Mbarriers(shape[0], self.scheduler)
            self.mbarriers += barriers.items
            return barriers
        unset = float("nan") if dtype.is_floating_point else torch.iinfo(dtype).min
        return Shared(torch.full(shape, unset, dtype=dtype), self.scheduler, self.proxy)

    def _language(self) -> SimpleNamespace:
        layouts = ("NVMMADistributedLayout", "DotOperandLayout", "SliceLayout", "BlockedLayout",
                   "NVMMASharedLayout", "SwizzledSharedLayout")  # fmt: skip
        return SimpleNamespace(
            **{name: lambda *_, **__: None for name in layouts},
            **{name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "int32", "int64", "int1")
               if hasattr(torch, name)},
            constexpr=None,
            allocate_shared_memory=self._allocate,
            atomic_add=_atomic_add,
            arange=lambda low, high, layout=None: torch.arange(low, high),
            cast=lambda x, dtype: x.to(dtype) if isinstance(x, torch.Tensor) else x,
            cdiv=lambda a, b: -(-a // b),
            convert_layout=lambda x, layout, **_: x,
            exp2=torch.exp2,
            full=lambda shape, value, dtype, layout=None: torch.full(shape, value, dtype=dtype),
            load=_load,
            log2=torch.log2,
            max=lambda x, axis: x.amax(axis),
            maximum=_either(torch.maximum, max),
            minimum=_either(torch.minimum, min),
            num_programs=lambda axis: self.grid[axis],
            permute=lambda x, order: x.permute(order),
            program_id=lambda axis: self.here.program[axis],
            reshape=lambda x, shape: x.reshape(shape),
            split=lambda x: (x[..., 0], x[..., 1]),
            static_assert=lambda *_: None,
            static_range=range,
            store=_store,
            sum=lambda x, axis: x.sum(axis),
            warp_specialize=self.warp_specialize,
            where=_where,
            zeros=lambda shape, dtype, layout=None: torch.zeros(shape, dtype=dtype),
        )  # fmt: skip


def _one(barrier: Any) -> Mbarrier:
    return barrier.items[0] if isinstance(barrier, Mbarriers) else barrier


def _init(barrier: Any, count: int) -> None:
    _one(barrier).expected = count


def _either(tensors: Callable, numbers: Callable) -> Callable:
    def choose(a: Any, b: Any) -> Any:
        if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
            return tensors(torch.as_tensor(a), torch.as_tensor(b))
        return numbers(a, b)

    return choose


def _where(condition: Any, a: Any, b: Any) -> Any:
    if any(isinstance(each, torch.Tensor) for each in (condition, a, b)):
        return torch.where(*map(torch.as_tensor, (condition, a, b)))
    return a if condition else b


def _load(pointer: Pointer, mask: torch.Tensor | None = None, other: Any = 0) -> Any:
    if not isinstance(pointer.offset, torch.Tensor):
        return pointer.memory[pointer.offset].item() if mask is None or mask else other
    if mask is None:
        return pointer.memory[pointer.offset]
    mask = mask.expand_as(pointer.offset)
    found = torch.full(mask.shape, other, dtype=pointer.memory.dtype)
    found[mask] = pointer.memory[pointer.offset[mask]]
    return found


def _atomic_add(pointer: Pointer, value: Any, mask: torch.Tensor | None = None, sem: str = "") -> torch.Tensor:
    before = _load(pointer, mask)
    _store(pointer, before + value, mask)
    return before


def _mask_rows(x: torch.Tensor, last: torch.Tensor, first: torch.Tensor, HAS_LEFT: bool) -> torch.Tensor:
    columns = torch.arange(x.shape[1])
    outside = columns > last[:, None]
    if HAS_LEFT:
        outside |= columns < first[:, None]
    return x.masked_fill(outside, float("-inf"))


def _store(pointer: Pointer, value: Any, mask: torch.Tensor | None = None) -> None:
    if isinstance(pointer.offset, torch.Tensor) and mask is not None:
        mask = mask.expand_as(pointer.offset)
        value = torch.as_tensor(value, dtype=pointer.memory.dtype).expand_as(pointer.offset)
        pointer.memory[pointer.offset[mask]] = value[mask]
    elif mask is None or mask:
        pointer.memory[pointer.offset] = value
