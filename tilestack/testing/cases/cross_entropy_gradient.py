"""Cases of cross_entropy_gradient."""

from __future__ import annotations

import torch

from tilestack.kernels import cross_entropy_gradient
from tilestack.testing.cases import cross_entropy
from tilestack.testing.compare import Case, OpCases


def _make(shape: dict, arguments: dict):
    build = cross_entropy.make(**shape, lse=True)

    def make(dtype, device, generator):
        tensors = build(dtype, device, generator)
        scaled = tensors["logits"].to(tensors["lse"].dtype) * arguments.get("logit_scale", 1.0)
        upstream = torch.randn(scaled.shape[:1], generator=generator).to(device)
        return tensors | {"lse": scaled.logsumexp(-1), "dlosses": upstream}

    return make


def _call(tensors, arguments, implementation):
    logits = tensors["logits"].clone() if arguments.get("inplace") else tensors["logits"]
    given = tensors | {"logits": logits}
    return {"dlogits": cross_entropy_gradient(**given, **arguments, implementation=implementation)}


def _case(name: str, why: str, shape: dict, arguments: dict, **more) -> Case:
    return Case(name, why, _make(shape, arguments), arguments, **more)


CASES = OpCases(
    op="cross_entropy_gradient",
    call=_call,
    differentiable=(),
    cases=(
        *(_case(*each) for each in cross_entropy.SHARED),
        _case("in place", "what is read was not overwritten", {"rows": 3, "classes": 4999}, {"inplace": True}),
        _case("a shard", "labels of other shards", cross_entropy.SHARD, cross_entropy.SHARD_ARGUMENTS),
        _case("Llama 3's vocabulary", "a real shape", cross_entropy.REAL, {"lse_square_scale": 1e-4}, gpu_only=True),
    ),
)
