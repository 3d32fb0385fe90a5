"""Kernels with planted faults, compiled offline: shows that the offline checks see them. Prints one JSON object.

A program of its own, because kernels of a process with TRITON_INTERPRET=1 cannot be compiled.
"""

import json
import tempfile

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tilestack.testing import offline
from tilestack.testing.loop_carry import finding_lost_variables


@triton.jit
def lost_in_a_later_iteration(out_ptr, n):
    slot = n % 3
    previous = slot
    for i in range(n):
        tl.store(out_ptr + i, previous)
        previous = slot
        slot = (slot + 1) % 3


@triton.jit
def lost_after_the_loop(out_ptr, n):
    slot = n % 3
    previous = slot
    for _ in range(n):
        previous = slot
        slot = (slot + 1) % 3
    tl.store(out_ptr, previous)


@triton.jit
def lost_under_a_condition(out_ptr, n):
    slot = n % 3
    previous = slot
    i = 0
    while i < n:
        if i % 2 == 0:
            previous = slot
        tl.store(out_ptr + i, previous)
        slot = (slot + 1) % 3
        i += 1


@triton.jit
def harmless_temporary(out_ptr, n):
    slot = n % 3
    current = slot
    for i in range(n):
        current = slot
        tl.store(out_ptr + i, current)
        slot = (slot + 1) % 3


@triton.jit
def properly_carried(out_ptr, n):
    slot = n % 3
    previous = (slot + 2) % 3
    for i in range(n):
        tl.store(out_ptr + i, previous)
        previous = slot
        slot = (slot + 1) % 3


@triton.jit
def spilling(out_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    values = tl.load(out_ptr + offs)
    tl.debug_barrier()
    tl.store(out_ptr + offs, values / tl.sum(values.to(tl.float32), 0))


SCALAR_KERNELS = (
    lost_in_a_later_iteration,
    lost_after_the_loop,
    lost_under_a_condition,
    harmless_temporary,
    properly_carried,
)


def main():
    found = {"lost": {}}
    with tempfile.TemporaryDirectory() as cache, triton.knobs.cache.scope():
        triton.knobs.cache.dir = cache
        for kernel in SCALAR_KERNELS:
            with finding_lost_variables() as lost:
                source = ASTSource(kernel, {"out_ptr": "*i32", "n": "i32"})
                triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 1})
            found["lost"][kernel.__name__] = sorted(each.name for each in lost)
        signature, constexprs = {"out_ptr": "*fp32", "BLOCK": "constexpr"}, {(1,): 8192}
        spilling.ASTSource = ASTSource  # a launch would set it
        launch = offline.Launch(spilling, "planted", signature, constexprs, {}, {"num_warps": 1}, "spilling")
        found["violations"] = offline.compile_launch("planted", launch, "sm_90").violations()
    found["unreached"] = sorted(offline.unreached("rms_norm", []))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
