"""Compiles what no case of the grid launches of moe's Hopper kernels: partial tiles, sums, what is not wanted.
Then it looks at how the portable ones add up in float32.

Prints the violated budgets as one JSON list. A program of its own, because kernels of a process with TRITON_INTERPRET=1
cannot be compiled.
"""

import json
import tempfile

import torch
import triton
from triton.backends.compiler import GPUTarget

from tilestack.kernels.moe import sm90_rows, sm90_weights, triton_portable
from tilestack.kernels.moe.sm90_layout import Layout, table_length
from tilestack.testing import offline

SHAPES = ((2048, 768, 8), (64, 192, 3))  # H, I, K
ALLOWED_SPILLS = {"moe_up_sm90_kernel": 2}  # where it only makes the pre-activation again


def launches(hidden, units, top_k, experts=4, tokens=24):
    def meta(*shape, dtype=torch.bfloat16):
        return torch.empty(shape, dtype=dtype, device="meta")

    with offline._pretending("sm_90"), offline._recording("variants") as found:
        routes = tokens * top_k
        layout = Layout(meta(table_length(routes, experts), dtype=torch.int32), routes, experts)
        x, gate_up = meta(tokens, hidden), meta(experts, 2 * units, hidden)
        for pre, activate in ((True, False), (False, True)):
            sm90_rows.up(x, gate_up, layout, top_k, pre=pre, activate=activate)
        rows, weighted, answers = (meta(layout.rows, width) for width in (2 * units, units, hidden))
        for dtype in (torch.float32, torch.bfloat16):
            total = meta(*gate_up.shape, dtype=dtype)
            sm90_weights.outer(rows, x, layout, top_k, gather="b", answers=answers, total=total)
            total = meta(experts, hidden, units, dtype=dtype)
            sm90_weights.outer(x, weighted, layout, top_k, gather="a", total=total)
    return found


def chains(hidden=64, units=64, experts=4, routes=74):
    """What is wrong with a float32 product: a step of it that goes on with the sum's chain of multiply-adds."""

    def meta(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    with offline._pretending("sm_90"), offline._recording("float32") as found:
        indices = (meta(experts + 1, dtype=torch.int32), *(meta(routes, dtype=torch.int32) for _ in range(2)))
        grouped = triton_portable._Grouped(meta(routes // 2, hidden), experts, indices, routes)
        grouped.multiply(meta(routes, 2 * units), meta(experts, 2 * units, hidden))
    (each,) = (each for each in found if each.kernel is triton_portable.moe_rows_kernel)
    source = each.kernel.ASTSource(each.kernel, each.signature, each.constexprs, each.attrs)
    code = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=each.options).asm["ttgir"]
    products = [line for line in code.splitlines() if "tt.dot " in line]
    assert products
    return [f"a product of float32 begins with the sum so far: {line}" for line in products if ", %arg" in line]


def main():
    with tempfile.TemporaryDirectory() as cache, triton.knobs.cache.scope():
        triton.knobs.cache.dir = cache
        compiled = [offline.compile_launch("moe", each, "sm_90") for shape in SHAPES for each in launches(*shape)]
        broken = chains()
    assert len(compiled) == 6 * len(SHAPES)
    allowed = [ALLOWED_SPILLS.get(each.kernel, 0) for each in compiled]
    broken += [line for each, spills in zip(compiled, allowed, strict=True) for line in each.violations(spills)]
    print(json.dumps(broken))


if __name__ == "__main__":
    main()
