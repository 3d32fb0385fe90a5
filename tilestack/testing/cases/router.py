"""Cases of router."""

from __future__ import annotations

import torch

from tilestack.kernels import router
from tilestack.testing.compare import Case, OpCases


def _make(T: int, E: int, *, masked: bool = False, ties: bool = False, strided: bool = False, scale: float = 2.0):
    def make(dtype, device, generator):
        logits = scale * torch.randn(T, 2 * E if strided else E, generator=generator)
        logits = logits.round() if ties else logits
        mask = torch.rand(T, generator=generator) < 0.7
        return {"logits": logits.to(device, dtype)[:, :E], "token_mask": mask.to(device) if masked else None}

    return make


def _call(tensors, arguments, implementation):
    return router(**tensors, **arguments, implementation=implementation)._asdict()


def _case(name: str, why: str, make, top_k: int, *, normalize: bool = True, gpu_only: bool = False) -> Case:
    return Case(name, why, make, {"top_k": top_k, "normalize": normalize}, gpu_only)


CASES = OpCases(
    op="router",
    call=_call,
    differentiable=("logits",),
    cases=(
        _case("plain", "the common case", _make(37, 32), 4),
        _case("not normalised", "the other formula of the gradient", _make(37, 32), 4, normalize=False),
        _case("masked", "the statistics leave tokens out", _make(50, 16, masked=True), 2),
        _case("ties", "the lower index wins", _make(40, 16, ties=True), 5),
        _case("odd experts", "E is no power of two, so loads are masked", _make(21, 60, masked=True), 8),
        _case("top 1", "a normalised weight of 1 has no gradient", _make(9, 8), 1),
        _case("all experts", "K = E", _make(9, 8), 8),
        _case("sixteen of 512", "the largest K and E", _make(5, 512), 16),
        _case("one expert", "E = 1", _make(4, 1), 1),
        _case("one token", "fewer rows than a block", _make(1, 128), 8),
        _case("no tokens", "an empty batch", _make(0, 16), 2),
        _case("strided", "logits are a slice of a wider tensor", _make(11, 16, strided=True), 2),
        _case("far apart", "probabilities underflow", _make(11, 16, scale=200.0), 4),
        _case("Qwen3-30B-A3B", "the real shape", _make(16384, 128, masked=True), 8, gpu_only=True),
    ),
)
