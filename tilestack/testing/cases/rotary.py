"""Cases of rotary."""

from __future__ import annotations

import torch

from tilestack.kernels import rotary
from tilestack.testing.compare import Case, OpCases


def _make(shape, half, positions=None, *, offsets=None, cu_seqlens=None, strided=False):
    def make(dtype, device, generator):
        def random(*size):
            return torch.randn(size, generator=generator).to(device, dtype)

        *outer, heads, head_dim = shape
        x = random(*outer, 3, heads, head_dim)[..., 1, :, :] if strided else random(*shape)
        angles = 10 * torch.rand(positions or outer[-1], half, generator=generator)
        return {
            "x": x,
            "cos": angles.cos().to(device, dtype),
            "sin": angles.sin().to(device, dtype),
            "seqlen_offsets": offsets if isinstance(offsets, int) else _integers(offsets, device),
            "cu_seqlens": _integers(cu_seqlens, device),
        }

    return make


def _integers(values, device):
    return None if values is None else torch.tensor(values, dtype=torch.int32, device=device)


def _call(tensors, arguments, implementation):
    offsets = tensors["seqlen_offsets"]
    x = tensors["x"].clone() if arguments.get("inplace") else tensors["x"]
    others = {"cos": tensors["cos"], "sin": tensors["sin"], "cu_seqlens": tensors["cu_seqlens"]}
    out = rotary(
        x, **others, seqlen_offsets=0 if offsets is None else offsets, **arguments, implementation=implementation
    )
    return {"out": out}


CASES = OpCases(
    op="rotary",
    call=_call,
    differentiable=(),
    cases=(
        Case("halves", "the common case", _make((2, 9, 3, 16), 8)),
        Case("interleaved", "pairs of neighbours", _make((2, 9, 5, 16), 8), {"interleaved": True}),
        Case("a part", "columns behind R are copied", _make((2, 5, 2, 20), 3)),
        Case("in place", "what is read was not overwritten", _make((2, 9, 3, 16), 4), {"inplace": True}),
        Case(
            "in place, interleaved",
            "the same for neighbours",
            _make((2, 9, 3, 16), 8),
            {"inplace": True, "interleaved": True},
        ),
        Case("conjugate", "what backward does", _make((2, 9, 3, 16), 8), {"conjugate": True}),
        Case("one offset", "a cache of the same length for all", _make((2, 5, 2, 16), 8, 12, offsets=7)),
        Case("offsets", "a cache each; one runs out of the table", _make((3, 5, 2, 16), 8, 12, offsets=[7, 0, 9])),
        Case(
            "packed",
            "an empty document, and rows of none",
            _make((14, 2, 16), 8, cu_seqlens=[0, 5, 5, 12]),
            {"max_seqlen": 7},
        ),
        Case(
            "packed with offsets",
            "positions begin elsewhere",
            _make((12, 2, 16), 4, 20, offsets=[3, 9], cu_seqlens=[0, 5, 12]),
            {"max_seqlen": 8},
        ),
        Case("strided", "x is a part of a packed tensor", _make((2, 9, 3, 16), 8, strided=True)),
        Case("one token", "decoding", _make((1, 1, 2, 8), 4)),
        Case("no rows", "an empty batch", _make((0, 4, 2, 8), 4)),
        Case("Qwen3-30B-A3B", "the real shape", _make((1, 4096, 36, 128), 64), gpu_only=True),
    ),
)  # fmt: skip
