"""attention_backward: the gradients of a forward that was run elsewhere, and who may compute them."""

import pytest
import torch
from test_attention import DEVICE, packed, random, results

from tilestack.kernels import UnsupportedError, attention, attention_backward, ops

OURS = ("tilestack-triton", "reference")


@pytest.mark.parametrize("implementation", OURS)
@pytest.mark.parametrize("layout", ["dense", "packed"])
def test_it_gives_the_bits_that_autograd_gives(implementation, layout):
    arguments = packed(20, 13, 0, 4)
    if layout == "dense":
        arguments = {name: arguments[name].detach()[None].requires_grad_() for name in "qkv"}
    options = {"causal": True, "softcap": 3.0, "dropout_p": 0.2, "implementation": implementation}
    options["dropout_seed"] = torch.tensor([5, 6], dtype=torch.int64, device=DEVICE)
    out, lse, *expected = results(arguments, **options)
    dout = random(*out.shape, dtype=out.dtype, seed=7).detach()
    found = attention_backward(dout, out=out, lse=lse, **arguments, **options)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    assert not any(each.requires_grad for each in found)


@pytest.mark.parametrize("implementation", OURS)
def test_out_and_lse_of_more_keys_give_this_parts_share_of_the_gradients(implementation):
    q, k, v = (random(2, length, heads, 16, seed=length) for length, heads in ((9, 4), (14, 2), (14, 2)))
    dout = random(*q.shape, seed=3).detach()
    out, lse = attention(q, k, v, return_lse=True, implementation=implementation)
    expected = torch.autograd.grad(out, (q, k, v), dout)
    parts = [
        attention_backward(dout, q, k[:, rows], v[:, rows], out, lse, implementation=implementation)
        for rows in (slice(5), slice(5, 14))
    ]
    torch.testing.assert_close(parts[0][0] + parts[1][0], expected[0])
    for index in (1, 2):
        torch.testing.assert_close(torch.cat([each[index] for each in parts], 1), expected[index])


def test_an_implementation_that_keeps_more_of_its_own_forward_says_so(monkeypatch):
    q = random(1, 4, 2, 16).detach()
    out, lse = attention(q, q, q, return_lse=True)
    module = ops()["attention"]._registered["tilestack-triton"].module
    monkeypatch.setattr(module, "AUXILIARY", ("statistics",))
    with pytest.raises(UnsupportedError, match="needs statistics of its own forward"):
        attention_backward(q, q, q, q, out, lse, implementation="tilestack-triton")


BAD = {
    r"dout must be \[1, 4, 2, 16\] \(the shape of q\), got \[1, 3, 2, 16\]": {"dout": torch.zeros(1, 3, 2, 16)},
    r"out must have the dtype of q \(torch.float32\), got torch.float16": {"out": torch.zeros(1, 4, 2, 16).half()},
    r"lse must be \[1, 2, 4\] \(\[B, Hq, Sq\], or packed \[Hq, Tq\]\), got \[1, 4, 2\]": {"lse": torch.zeros(1, 4, 2)},
    "lse must be torch.float32, got torch.float64": {"lse": torch.zeros(1, 2, 4).double()},
    "dropout_seed is missing": {"dropout_p": 0.1},
}


@pytest.mark.parametrize("message", BAD)
def test_wrong_input_gets_one_clear_error(message):
    arguments = {name: torch.zeros(1, 4, 2, 16) for name in ("dout", "q", "k", "v", "out")}
    with pytest.raises(ValueError, match=f"^attention: {message}"):
        attention_backward(**arguments | {"lse": torch.zeros(1, 2, 4)} | BAD[message])
