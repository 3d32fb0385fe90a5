"""swiglu: what it refuses, and that the reference is transformers' product."""

import pytest
import torch

from tilestack.kernels import swiglu


def test_in_float32_the_reference_has_the_bits_of_transformers():
    gate, up = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(0))
    assert torch.equal(swiglu(gate, up), torch.nn.functional.silu(gate) * up)


@pytest.mark.parametrize(
    ("gate", "up", "message"),
    [
        (torch.ones(3, 4), torch.ones(3, 5), r"up must be \[3, 4\] \(the shape of gate\), got \[3, 5\]"),
        (torch.ones(3), torch.ones(3).half(), r"up must have the dtype of gate \(torch.float32\), got torch.float16"),
        (torch.ones(3).int(), torch.ones(3).int(), "gate must be floating point, got torch.int32"),
        (torch.ones(3), torch.ones(3, device="meta"), "up must have the device of gate"),
    ],
)
def test_wrong_input_gets_one_clear_error(gate, up, message):
    with pytest.raises(ValueError, match=f"swiglu: {message}"):
        swiglu(gate, up)
