"""rotary beyond the shared grid: errors, and what is left alone."""

import pytest
import torch

from tilestack.kernels import rotary

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

DENSE = {"x": torch.ones(2, 5, 3, 8), "cos": torch.ones(9, 4), "sin": torch.zeros(9, 4)}
CU = torch.tensor([0, 2, 5], dtype=torch.int32)
BAD = {
    "x must be floating point, got torch.int64": {"x": torch.ones(2, 5, 3, 8).long()},
    r"x must be \[B, S, H, D\], or packed \[T, H, D\], got 2 dimensions": {"x": torch.ones(5, 8)},
    r"cos must be \[positions, R / 2\], got 3 dimensions": {"cos": torch.ones(1, 9, 4)},
    r"sin must be \[9, 4\] \(the shape of cos\), got \[9, 3\]": {"sin": torch.ones(9, 3)},
    r"cos must have the dtype of x \(torch.float32\), got torch.float16": {"cos": torch.ones(9, 4).half()},
    "sin must have the device of x": {"sin": torch.ones(9, 4, device="meta")},
    "cos must have at most D / 2 columns, D = 8, got 5": {"cos": torch.ones(9, 5), "sin": torch.ones(9, 5)},
    "the positions of cos must be at least 11, got 9": {"seqlen_offsets": 6},
    "seqlen_offsets must be at least 0, got -1": {"seqlen_offsets": -1},
    "seqlen_offsets must be int32 or int64, got torch.float32": {"seqlen_offsets": torch.ones(2)},
    r"seqlen_offsets must be \[2\] \(one for each sequence\), got \[3\]": {"seqlen_offsets": CU},
    "cu_seqlens and max_seqlen belong to packed x": {"cu_seqlens": CU, "max_seqlen": 3},
    "the last stride of x must be 1 to rotate in place, got 3": {
        "x": torch.ones(2, 5, 8, 3).transpose(2, 3),
        "inplace": True,
    },
}
PACKED = {"x": torch.ones(5, 3, 8), "cu_seqlens": CU, "max_seqlen": 3}
BAD_PACKED = {
    "cu_seqlens and max_seqlen belong to packed x": {"max_seqlen": None},
    "cu_seqlens must be torch.int32, got torch.int64": {"cu_seqlens": CU.long()},
    "max_seqlen must be at least 0, got -1": {"max_seqlen": -1},
}


@pytest.mark.parametrize(
    ("message", "arguments"),
    [(message, DENSE | wrong) for message, wrong in BAD.items()]
    + [(message, DENSE | PACKED | wrong) for message, wrong in BAD_PACKED.items()],
)
def test_wrong_input_gets_one_clear_error(message, arguments):
    with pytest.raises(ValueError, match=f"^rotary: {message}"):
        rotary(**arguments)


@pytest.mark.parametrize("implementation", ["tilestack-triton", "reference"])
def test_in_place_writes_x_alone_and_out_of_place_leaves_it(implementation):
    whole = torch.randn(2, 5, 4, 8, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    x, (cos, sin) = whole[:, :, 1:3], torch.tensor([0.0, 1.0], device=DEVICE)[:, None, None].expand(2, 5, 4)
    before = whole.clone()
    out = rotary(x, cos, sin, implementation=implementation)
    assert torch.equal(whole, before)
    assert torch.equal(out, torch.cat((-x[..., 4:], x[..., :4]), -1))
    assert rotary(x, cos, sin, inplace=True, implementation=implementation) is x
    assert torch.equal(whole[:, :, 1:3], out) and torch.equal(whole[:, :, ::3], before[:, :, ::3])
