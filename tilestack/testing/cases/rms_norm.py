"""Cases of rms_norm."""

from __future__ import annotations

import torch

from tilestack.kernels import rms_norm
from tilestack.testing.compare import Case, OpCases


def _make(shape: tuple[int, ...], *, residual: bool = False, strided: bool = False, scale: float = 1.0):
    def make(dtype, device, generator):
        def random(*size):
            return (scale * torch.randn(*size, generator=generator)).to(device, dtype)

        x = random(*shape[:-1], 2 * shape[-1])[..., : shape[-1]] if strided else random(*shape)
        return {"x": x, "weight": random(shape[-1]), "residual": random(*shape) if residual else None}

    return make


def _call(tensors, arguments, implementation):
    result = rms_norm(**tensors, **arguments, implementation=implementation)
    return {"out": result} if tensors["residual"] is None else dict(zip(("out", "residual_out"), result, strict=True))


CASES = OpCases(
    op="rms_norm",
    call=_call,
    differentiable=("x", "weight", "residual"),
    cases=(
        Case("plain", "the common case", _make((3, 5, 64))),
        Case("residual", "two inputs and two outputs", _make((3, 5, 64), residual=True)),
        Case("odd width", "H is no power of two, so loads are masked", _make((7, 67), residual=True)),
        Case("one row", "fewer rows than programs", _make((1, 128))),
        Case("width one", "the mean is over one element", _make((4, 1))),
        Case("strided", "x is a slice of a wider tensor", _make((3, 5, 64), residual=True, strided=True)),
        Case("tiny values", "eps is not negligible", _make((4, 64), scale=1e-3)),
        Case("no rows", "an empty batch", _make((0, 64), residual=True)),
        Case("Qwen3-30B-A3B", "the real shape", _make((4096, 2048), residual=True), gpu_only=True),
    ),
)
