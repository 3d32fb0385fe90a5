"""What of the gradients has the same bits each time: what the user asked for reaches the op, from every way in."""

import pytest
import torch
from test_flash_attention import inputs, offsets

from tilestack.compat import flash_attn
from tilestack.compat.flash_attn import attend, flash_attn_2_cuda
from tilestack.compat.flash_attn import flash_attn_interface as interface

CU = offsets((4, 5))
LONGEST = (5, 5)
SCALARS = (0.0, 0.25, True, -1, -1, 0.0, None)  # dropout_p, softmax_scale, causal, window, softcap, alibi_slopes


@pytest.fixture
def asked(monkeypatch):
    """The `deterministic` of each call of the op and of its backward."""
    found = []
    for module, name in ((attend, "attention"), (flash_attn_2_cuda, "attention_backward")):
        original = getattr(module, name)

        def listening(*tensors, original=original, deterministic, **options):
            found.append(deterministic)
            return original(*tensors, deterministic=deterministic, **options)

        monkeypatch.setattr(module, name, listening)
    return found


def dense():
    return [each.detach() for each in inputs(1, 9, 9, heads=2)]


def backward_arguments(packed):
    q, k, v, dout = (each[0] if packed else each for each in dense())
    places = (CU, CU, *LONGEST) if packed else ()
    if packed:
        out, lse, *_ = interface._flash_attn_varlen_forward(q, k, v, *places, *SCALARS)
    else:
        out, lse, *_ = interface._flash_attn_forward(q, k, v, *SCALARS, False)
    return (dout, q, k, v, out, lse), places


def public(name):
    function = getattr(flash_attn, name)
    q, k, v, _ = dense()
    tensors = {
        "qkvpacked": (torch.stack((q, k, v), 2),), "kvpacked": (q, torch.stack((k, v), 2)), "": (q, k, v)
    }[next(kind for kind in ("qkvpacked", "kvpacked", "") if kind in name)]  # fmt: skip
    if "varlen" in name:
        tensors = [each[0] for each in tensors]
        tensors += [CU, 5] if "qkvpacked" in name else [CU, CU, *LONGEST]
    return lambda deterministic: function(*tensors, deterministic=deterministic)


PUBLIC = [each for each in flash_attn.__all__ if each != "flash_attn_with_kvcache"]


@pytest.mark.parametrize("name", PUBLIC)
@pytest.mark.parametrize(("deterministic", "expected"), [(False, "keys"), (True, True)])
def test_a_public_function_asks_for_what_its_user_asked_for(name, deterministic, expected, asked):
    public(name)(deterministic)
    assert asked == [expected]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("deterministic", "expected"), [(False, "keys"), (True, True)])
def test_the_private_backward_functions_ask_for_what_they_were_told(packed, deterministic, expected, asked):
    saved, places = backward_arguments(packed)
    private = interface._flash_attn_varlen_backward if packed else interface._flash_attn_backward
    asked.clear()
    private(*saved, None, None, None, *places, *SCALARS, deterministic)
    compiled = flash_attn_2_cuda.varlen_bwd if packed else flash_attn_2_cuda.bwd
    *numbers, slopes = SCALARS
    if packed:  # zero_tensors stands between the scale and causal
        numbers.insert(2, False)
    places = (*places[:2], slopes, *places[2:])
    compiled(*saved, None, None, None, *places, *numbers, deterministic)
    assert asked == [expected, expected]
