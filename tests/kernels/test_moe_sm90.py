"""The Hopper kernels of moe on the CPU, in the Gluon emulator: numbers, what is not needed, planted bugs."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from tilestack.kernels.moe import reference, sm90_activation, sm90_gluon, sm90_rows, sm90_weights
from tilestack.kernels.moe.op import MoEParams
from tilestack.testing.compare import assert_close
from tilestack.testing.gluon_emulator import Emulator

NEEDS = ("x", "gate_up", "down", "topk_weights")
KERNELS = (
    (sm90_rows, "moe_up_sm90_kernel"),
    (sm90_rows, "moe_rows_sm90_kernel"),
    (sm90_activation, "moe_activation_bwd_sm90_kernel"),
    (sm90_weights, "moe_weights_bwd_sm90_kernel"),
)


def balanced(tokens, top_k, experts, generator):
    return torch.rand(tokens, experts, generator=generator).argsort(-1)[:, :top_k]


def skewed(tokens, top_k, experts, generator):
    chance = torch.rand(tokens, experts, generator=generator) ** (1.0 + torch.arange(experts))
    return chance.argsort(-1, descending=True)[:, :top_k]


def one_takes_all(tokens, top_k, experts, generator):
    return torch.full((tokens, top_k), experts - 2)


def partly_elsewhere(tokens, top_k, experts, generator):
    return torch.randint(-2, experts + 3, (tokens, top_k), generator=generator)


CASES = {  # T, H, I, E, K, routing, weights
    "balanced": (150, 256, 256, 3, 2, balanced, True),
    "skewed, more tiles than programs, more steps than stages": (400, 320, 128, 5, 2, skewed, True),
    "one expert takes all, the others are empty": (200, 128, 128, 4, 1, one_takes_all, True),
    "one route a token, no weights, 77 tokens": (77, 64, 64, 3, 1, balanced, False),
    "ids of other ranks, H and I of partial tiles": (90, 192, 192, 4, 3, partly_elsewhere, True),
    "one token": (1, 128, 320, 20, 16, balanced, True),
}


def make(case, dtype):
    tokens, hidden, units, experts, top_k, routing, weighted = case
    generator = torch.Generator().manual_seed(0)

    def random(*size, scale=1.0):
        return (scale * torch.randn(*size, generator=generator)).to(dtype)

    tensors = [
        random(tokens, hidden),
        random(experts, 2 * units, hidden, scale=hidden**-0.5),
        random(experts, hidden, units, scale=units**-0.5),
        routing(tokens, top_k, experts, generator).int(),
        torch.rand(tokens, top_k, generator=generator) + 0.1 if weighted else None,
    ]
    return tensors, random(tokens, hidden)


def run_hopper(tensors, dout, emulator, monkeypatch, needs):
    """Out and gradients of the emulated kernels, with 3 programs in place of a GPU's multiprocessors."""
    for module, name in KERNELS:
        monkeypatch.setattr(module, name, emulator.launcher(getattr(module, name)))
    monkeypatch.setattr("tilestack.kernels.launch.multiprocessors", lambda tensor: 3)
    x, gate_up, down, topk_ids, topk_weights = tensors
    out, *auxiliary = sm90_gluon.forward(*tensors, MoEParams())
    saved = (x, gate_up, down, topk_ids, topk_weights, *auxiliary)
    gradients = sm90_gluon.backward(dout, *saved, needs=needs, params=MoEParams())
    return {"out": out} | dict(zip(needs, gradients, strict=True))


def run_reference(tensors, dout, dtype, needs):
    tensors = [each.to(dtype) if each is not None and each.is_floating_point() else each for each in tensors]
    if tensors[4] is not None:
        tensors[4] = tensors[4].to(torch.promote_types(dtype, torch.float32))
    (out,) = reference.forward(*tensors, MoEParams())
    gradients = reference.backward(dout.to(dtype), *tensors, needs=needs, params=MoEParams())
    return {"out": out} | dict(zip(needs, gradients, strict=True))


def check(case, emulator, monkeypatch, dtype=torch.bfloat16, needs=None):
    tensors, dout = make(case, dtype)
    needs = needs or tuple(name for name in NEEDS if name != "topk_weights" or tensors[4] is not None)
    ours = run_hopper(tensors, dout, emulator, monkeypatch, needs)
    eager, exact = (run_reference(tensors, dout, each, needs) for each in (dtype, torch.float64))
    for name in exact:
        assert_close(name, ours[name], eager[name], exact[name])


@pytest.mark.parametrize("name", CASES)
def test_emulated_hopper_kernels_are_within_twice_the_error_of_eager(name, monkeypatch):
    check(CASES[name], Emulator(), monkeypatch)


def test_emulated_hopper_kernels_take_float16(monkeypatch):
    check(CASES["ids of other ranks, H and I of partial tiles"], Emulator(), monkeypatch, torch.float16)
