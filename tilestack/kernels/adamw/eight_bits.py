"""Moments in 8 bits: the format, in plain torch. `triton_portable.py` has the same in a kernel.

Each 256 consecutive elements of the flattened tensor share one float32 scale, the largest magnitude among them; an
element is its share of it, x in [-1, 1], as a small floating-point number without a special value:

    first moment     sign, 4 bits of exponent, 3 of mantissa    0 or 2^-15.7 to 1
    second moment    5 bits of exponent, 3 of mantissa          0 or 2^-31.7 to 1

A code but 0 is the upper bits of x as a float32, counted from the smallest. So rounding is adding a number below the
unit to the bits and cutting them off: half a unit is to nearest, a random one stochastic, which is right on average.
That is what training needs: at beta 0.95 and more a step changes a moment by less than the unit, and nearest would
never move it. A second moment that is not 0 is never rounded to 0, or the step would be divided by eps.
"""

from __future__ import annotations

import torch

GROUP = 256  # elements that share a scale
UNIT = 1 << 20  # of a code, in the bits of a float32: 3 bits of mantissa are kept
ONE = (127 << 23) // UNIT  # 1.0 in units
FIRST_ZERO, SECOND_ZERO = ONE - 127, ONE - 255  # what code 0 would be; 127 and 255 stand for 1.0
LEAST = ((FIRST_ZERO + 1) % 8 / 8 + 1) * 2.0 ** ((FIRST_ZERO + 1) // 8 - 127)  # the smallest first moment
SMALLEST_SCALE = 2.0**-126  # whose inverse is finite; smaller groups are 0


def scales_of(numel: int) -> int:
    """How many scales a tensor of so many elements has."""
    return -(-numel // GROUP)


def encode(
    moment: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, *, signed: bool, random: torch.Tensor | None = None
) -> None:
    """Write `moment` (float32, any shape) into `codes` (uint8, the same shape) and `scales` (float32 [scales_of]).

    signed: the format of the first moment, else of the second. random: integers in [0, UNIT), the shape of moment
    flattened; None rounds to nearest, which gives back the codes of what `decode` gave.
    """
    groups = _groups(moment.reshape(-1).float())
    largest = groups.abs().amax(1)
    largest = torch.where(largest >= SMALLEST_SCALE, largest, 0.0)
    inverse = 1 / torch.where(largest > 0, largest, 1.0)
    share = (groups.abs() * inverse[:, None]).clamp_(max=1.0).reshape(-1)[: moment.numel()]
    added = UNIT // 2 if random is None else random.int()
    zero = FIRST_ZERO if signed else SECOND_ZERO
    found = (share.view(torch.int32) + added) // UNIT - zero
    if signed:
        low = (share * (1 / LEAST) + added / UNIT).int()
        found = torch.where(share < LEAST, low, found)
        found |= (moment.reshape(-1) < 0).int() << 7
    else:
        found = torch.where(share > 0, found.clamp_(min=1), 0)
    codes.view(-1).copy_(found)
    scales.copy_(largest)


def decode(codes: torch.Tensor, scales: torch.Tensor, *, signed: bool) -> torch.Tensor:
    """What the codes stand for: the shape of codes, scales' dtype (exact in float64)."""
    flat = codes.reshape(-1).int()
    magnitude = flat & 127 if signed else flat
    share = ((magnitude + (FIRST_ZERO if signed else SECOND_ZERO)) * UNIT).view(torch.float32).to(scales.dtype)
    share = torch.where(magnitude == 0, 0.0, share)
    if signed:
        share = torch.where(flat > 127, -share, share)
    return (_groups(share) * scales[:, None]).reshape(-1)[: codes.numel()].view(codes.shape)


def _groups(flat: torch.Tensor) -> torch.Tensor:
    padded = torch.nn.functional.pad(flat, (0, scales_of(flat.numel()) * GROUP - flat.numel()))
    return padded.view(-1, GROUP)
