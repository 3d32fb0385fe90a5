"""attention on a GPU: equal bits of many deterministic backward passes."""

import pytest
import torch

from tilestack.kernels import attention

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
REPEATS = 200
CAUSAL = {"causal": True}
CASES = {  # batch, length, heads, key heads, head dimension, options; "lengths": packed
    "causal, a group of eight, D = 128": (1, 4096, 16, 2, 128, CAUSAL),
    "causal, D = 64": (2, 1500, 8, 8, 64, CAUSAL),
    "every key, D = 96": (2, 1000, 4, 2, 96, {}),
    "causal, D = 256": (1, 1000, 4, 2, 256, CAUSAL),
    "causal, a group of four, D = 256": (1, 1000, 8, 2, 256, CAUSAL),
    "window, soft cap, D = 192": (1, 1000, 4, 2, 192, {"window_size": (300, 20), "softcap": 5.0}),
    "packed, sinks, D = 128": (None, (1000, 0, 700, 1, 300), 8, 2, 128, CAUSAL),
}
KEYS = ("causal, a group of eight, D = 128", "causal, a group of four, D = 256")  # dk and dv alone: in turn, and not


@pytest.mark.parametrize(
    ("name", "deterministic"), [*((name, True) for name in CASES), *((name, "keys") for name in KEYS)]
)
def test_two_hundred_deterministic_backwards_give_equal_bits(name, deterministic):
    batch, lengths, heads, kv_heads, head_dim, options = CASES[name]
    generator = torch.Generator("cuda").manual_seed(0)

    def random(*size):
        return torch.randn(*size, generator=generator, device="cuda", dtype=torch.bfloat16)

    if batch is None:
        offsets = torch.tensor([0, *lengths], device="cuda").cumsum(0).int()
        options = options | {"cu_seqlens_q": offsets, "cu_seqlens_k": offsets, "sinks": random(heads).requires_grad_()}
    leading = (sum(lengths),) if batch is None else (batch, lengths)
    leaves = [random(*leading, each, head_dim).requires_grad_() for each in (heads, kv_heads, kv_heads)]
    dout = random(*leading, heads, head_dim)
    leaves += [options["sinks"]] if "sinks" in options else []
    out = attention(*leaves[:3], **options, deterministic=deterministic)
    leaves = leaves[1:3] if deterministic == "keys" else leaves
    first = torch.autograd.grad(out, leaves, dout, retain_graph=True)
    for _ in range(REPEATS - 1):
        again = torch.autograd.grad(out, leaves, dout, retain_graph=True)
        assert all(torch.equal(*pair) for pair in zip(first, again, strict=True))
