"""Compiles float32 sums over tiles offline; prints, as one JSON object, by kernel: how many products does Triton chain
onto the sum of those before?

A program of its own, because kernels of a process with TRITON_INTERPRET=1 cannot be compiled.
"""

import json
import re
import tempfile

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tilestack.kernels.triton_numerics import dot


@triton.jit
def added(a_ptr, b_ptr, out_ptr, n, TERMS: tl.constexpr):
    offs = tl.arange(0, 16)[:, None] * TERMS + tl.arange(0, TERMS)[None, :]
    total = tl.zeros([16, 16], tl.float32)
    for start in range(0, n, 16 * TERMS):
        total += tl.dot(tl.load(a_ptr + start + offs), tl.trans(tl.load(b_ptr + start + offs)), input_precision="ieee")
    tl.store(out_ptr + tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :], total)


@triton.jit
def ours(a_ptr, b_ptr, out_ptr, n, TERMS: tl.constexpr):
    offs = tl.arange(0, 16)[:, None] * TERMS + tl.arange(0, TERMS)[None, :]
    total = tl.zeros([16, 16], tl.float32)
    for start in range(0, n, 16 * TERMS):
        total = dot(tl.load(a_ptr + start + offs), tl.trans(tl.load(b_ptr + start + offs)), total, "ieee")
    tl.store(out_ptr + tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :], total)


def chained(kernel) -> int:
    signature = dict.fromkeys(("a_ptr", "b_ptr", "out_ptr"), "*fp32") | {"n": "i32", "TERMS": "constexpr"}
    source = ASTSource(kernel, signature, {(4,): 16})
    text = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 1}).asm["ttir"]
    sums = re.findall(r"tt\.dot %\S+, %\S+, %(\S+)", text)
    assert sums, "no product"
    return sum(not each.startswith("cst") for each in sums)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as cache, triton.knobs.cache.scope():
        triton.knobs.cache.dir = cache
        print(json.dumps({each.__name__: chained(each) for each in (added, ours)}))
