"""What several ops' kernels compute with: constants, and products and exponentials for float32 inputs, which need them
more exactly than 16-bit ones.

PRECISION is the dtype's: "ieee" for float32, "tf32" (which means nothing to them) for 16-bit dtypes.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LOG2E_LOW = tl.constexpr(1.9259630335e-08)  # log2 e less its float32
LN2 = tl.constexpr(0.6931471805599453)
TERMS = tl.constexpr(16)  # of one chain of multiply-adds; tl.dot takes no fewer


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """a @ b + acc; acc may be None.

    In float32 each sum of a product is one chain of multiply-adds, which rounds at the size of the whole sum: over a
    head dimension the error of eager, which sums in blocks, is several times smaller. So here, too, sums of TERMS
    products are added to each other, and then to acc. Where there is one such sum, tl.sum keeps it from acc: Triton
    turns acc + tl.dot(a, b) into a chain that goes on from acc, over all tiles.
    """
    if PRECISION != "ieee":
        return tl.dot(a, b, acc, input_precision=PRECISION)
    parts_a = tl.permute(tl.reshape(a, [a.shape[0], a.shape[1] // TERMS, TERMS]), [1, 0, 2])
    parts_b = tl.reshape(b, [b.shape[0] // TERMS, TERMS, b.shape[1]])
    product = tl.sum(tl.dot(parts_a, parts_b, input_precision=PRECISION), 0)
    return product if acc is None else acc + product


@triton.jit
def exponent_unit(PRECISION: tl.constexpr):
    """What exponents (scaled scores, their maximum, lse) are multiplied by while a kernel works on them.

    For 16-bit dtypes log2 e, so that a weight costs one multiply-add and exp2. Rounded into the scale and into lse,
    log2 e is an error of every exponent; in float32 it would be seen, so the unit there is 1.
    """
    return 1.0 if PRECISION == "ieee" else LOG2E


@triton.jit
def exponential(x, PRECISION: tl.constexpr):
    """e to the x, x in the kernel's unit.

    In float32 the product x log2 e rounds at the size of an exponent of 10 or 20, which every weight would show: what
    it lost is multiplied back.
    """
    if PRECISION != "ieee":
        return tl.exp2(x)
    finite = tl.where(x == float("-inf"), 0.0, x)
    lost = tl.fma(finite, tl.full(x.shape, LOG2E, tl.float32), -(finite * LOG2E)) + finite * LOG2E_LOW
    result = tl.exp2(x * LOG2E)
    return result + result * (lost * LN2)


@triton.jit
def logarithm(x, PRECISION: tl.constexpr):
    """The natural logarithm; in float32 rounded once."""
    return tl.log(x) if PRECISION == "ieee" else tl.log2(x) * LN2


@triton.jit
def hyperbolic_tangent(x, PRECISION: tl.constexpr):
    """tanh x.

    1 - 2 / (e^2|x| + 1) is wrong by one unit of 1 in float32, which is much of a small tanh. For 16-bit dtypes that is
    nothing; in float32 small arguments take an odd polynomial, fitted to a relative error of 1e-9 below 0.55.
    """
    if PRECISION != "ieee":
        return 1.0 - 2.0 / (1.0 + tl.exp2(x * (2.0 * LOG2E)))
    magnitude = tl.abs(x)
    large = 1.0 - tl.div_rn(tl.full(x.shape, 2.0, tl.float32), 1.0 + exponential(2.0 * magnitude, PRECISION))
    square = x * x
    terms = (-6.27423357e-3 * square + 2.10716743e-2) * square - 5.38523085e-2
    terms = (terms * square + 0.13332586) * square - 0.333333164
    small = magnitude + magnitude * square * terms
    result = tl.where(magnitude < 0.55, small, large)
    return tl.where(x < 0.0, -result, result)
