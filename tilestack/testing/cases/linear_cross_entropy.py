"""Cases of linear_cross_entropy."""

from __future__ import annotations

import torch

from tilestack.kernels import linear_cross_entropy
from tilestack.testing.compare import Case, OpCases


def _make(
    tokens: int,
    vocabulary: int,
    hidden_size: int,
    *,
    ignored: float = 0.0,
    scale: float = 1.0,
    shift: float = 0.0,
    layout: str = "contiguous",
    num_items: int | None = None,
    weighted: bool = False,
):
    """ignored: the share of the labels that do not count. scale: roughly the size of the logits. shift: their mean."""

    def make(dtype, device, generator):
        def random(*size):
            return torch.randn(*size, generator=generator)

        hidden = (random(tokens, 2 * hidden_size) * scale * hidden_size**-0.5).to(device, dtype)
        weight = random(vocabulary, hidden_size)
        if shift:
            hidden[:, 0], weight[:, 0] = shift, 1.0
        hidden = {
            "contiguous": hidden[:, :hidden_size].contiguous(),
            "sliced": hidden[:, :hidden_size],
            "strided": hidden[:, ::2],
        }[layout]
        labels = torch.randint(0, vocabulary, (tokens,), generator=generator)
        labels[torch.rand(tokens, generator=generator) < ignored] = -100
        return {
            "hidden": hidden,
            "weight": weight.to(device, dtype),
            "labels": labels.to(device),
            "num_items": None if num_items is None else torch.tensor(num_items, device=device),
            "token_weights": _weights(tokens, dtype, device, generator) if weighted else None,
        }

    return make


def _weights(tokens, dtype, device, generator):
    """Some of them 0, some below it, as of a policy's advantages."""
    weights = torch.randn(tokens, generator=generator)
    weights[::5] = 0
    return weights.to(device, torch.promote_types(dtype, torch.float32))


def _call(tensors, arguments, implementation):
    found = linear_cross_entropy(**tensors, **arguments, implementation=implementation)
    return dict(zip(("loss", "token_losses"), found if isinstance(found, tuple) else (found,), strict=False))


EVERYTHING = {"label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 5.0}


CASES = OpCases(
    op="linear_cross_entropy",
    call=_call,
    differentiable=("hidden", "weight"),
    cases=(
        Case("plain", "the common case", _make(24, 1000, 64)),
        Case("odd vocabulary", "no multiple of anything, so loads are masked", _make(23, 1187, 48, ignored=0.3)),
        Case("several blocks", "V is larger than one block of the kernel", _make(16, 17000, 64, ignored=0.3)),
        Case("sum", "no divisor", _make(24, 300, 64, ignored=0.3), {"reduction": "sum"}),
        Case("none", "one upstream gradient a token", _make(24, 300, 64, ignored=0.3), {"reduction": "none"}),
        Case(
            "none, several blocks",
            "backward makes the logits again",
            _make(16, 9001, 64, ignored=0.3),
            {"reduction": "none"},
        ),
        Case("num_items", "the mean over a global batch", _make(24, 300, 64, ignored=0.3, num_items=40)),
        Case("all ignored", "the mean over nothing is 0, with zero gradients", _make(6, 300, 64, ignored=1.0)),
        Case("ignore_index", "a label that is also a word", _make(40, 5, 64), {"ignore_index": 3}),
        Case("label smoothing", "every logit has a target", _make(24, 300, 64, ignored=0.3), {"label_smoothing": 0.2}),
        Case("z-loss", "the log-sum-exp is part of the loss", _make(24, 300, 64, ignored=0.3), {"z_loss": 1e-2}),
        Case("softcap", "the logits are bent, some of them flat", _make(24, 300, 64, scale=4.0), {"softcap": 3.0}),
        Case("token weights", "a loss that counts double, not, or against", _make(24, 300, 64, weighted=True)),
        Case(
            "token losses",
            "they are not divided",
            _make(24, 300, 64, ignored=0.3, weighted=True),
            {"return_token_losses": True},
        ),
        Case(
            "everything, several blocks",
            "options meet each other and a masked end",
            _make(12, 9001, 64, ignored=0.3, num_items=20, weighted=True),
            EVERYTHING | {"return_token_losses": True},
        ),
        Case(
            "everything, none",
            "backward makes it all again",
            _make(16, 301, 64, ignored=0.3, weighted=True),
            EVERYTHING | {"reduction": "none"},
        ),
        Case("one token", "fewer rows than anything", _make(1, 300, 128)),
        Case("one word", "the loss is 0 and every gradient too", _make(4, 1, 16)),
        Case("no tokens", "an empty batch", _make(0, 300, 16)),
        Case("sliced", "hidden is a slice of a wider tensor", _make(24, 300, 64, layout="sliced")),
        Case("strided", "no dimension of hidden is contiguous", _make(24, 300, 64, layout="strided")),
        Case(
            "large logits", "softmax overflows unless the largest logit is subtracted", _make(24, 600, 64, scale=30.0)
        ),
        Case("low logits", "exp of every logit is 0", _make(24, 600, 64, shift=-200.0)),
        Case("Qwen3-30B-A3B", "the real shape", _make(4096, 151936, 2048, ignored=0.1), gpu_only=True),
    ),
)
