"""Cases of swiglu."""

from __future__ import annotations

import torch

from tilestack.kernels import swiglu
from tilestack.testing.compare import Case, OpCases


def _make(shape: tuple[int, ...], *, fused: bool = False, transposed: bool = False, scale: float = 1.0):
    def make(dtype, device, generator):
        def random(*size):
            return (scale * torch.randn(*size, generator=generator)).to(device, dtype)

        if fused:
            gate, up = random(*shape[:-1], 2 * shape[-1]).chunk(2, dim=-1)
            return {"gate": gate, "up": up}
        if transposed:
            return {"gate": random(*reversed(shape)).permute(*reversed(range(len(shape)))), "up": random(*shape)}
        return {"gate": random(*shape), "up": random(*shape)}

    return make


def _call(tensors, arguments, implementation):
    return {"out": swiglu(**tensors, **arguments, implementation=implementation)}


CASES = OpCases(
    op="swiglu",
    call=_call,
    differentiable=("gate", "up"),
    cases=(
        Case("plain", "the common case", _make((3, 5, 64))),
        Case(
            "fused projection",
            "gate and up are halves of one tensor, so rows are strided",
            _make((3, 5, 64), fused=True),
        ),
        Case("odd width", "I is no power of two, so loads are masked", _make((7, 67))),
        Case("odd width, fused", "up begins at an odd address", _make((5, 33), fused=True)),
        Case("wide", "more than one block in a row", _make((3, 2100))),
        Case("one row", "fewer rows than a block", _make((1, 128))),
        Case("one dimension", "no rows at all", _make((130,))),
        Case("transposed", "the last dimension is not contiguous", _make((6, 40), transposed=True)),
        Case("large values", "exp(-gate) overflows to infinity, and the sigmoid is 0", _make((4, 64), scale=100.0)),
        Case("no rows", "an empty batch", _make((0, 64))),
        Case("Qwen3-30B-A3B", "the width of its dense layers", _make((4096, 6144)), gpu_only=True),
        Case("fused, real width", "long strided rows", _make((4096, 6144), fused=True), gpu_only=True),
    ),
)
