"""Which rows and columns a program of the Triton kernels works on: device functions that the kernels share.

A sequence is an element of a dense batch or a document of packed input. Its "own" side is the one whose blocks are
handed out to programs: the queries, or in the kernel of dk and dv the keys. The "other" side is looped over.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Numbers for whose divisibility no kernel is compiled anew: they change with every batch, and address nothing.
VARYING = ("n_documents", "n_blocks", "left", "right", "stride_slopes", "threshold")


@triton.jit
def locate(
    own_offsets_ptr, other_offsets_ptr, n_documents, own_length, other_length, block, BLOCK: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """The sequence that a block belongs to: (own start, own length, other start, other length, block in sequence,
    number of the document).

    In packed input the blocks of document d begin at offset[d] // BLOCK + d: no more than one block a document is
    empty, and the number of blocks needs no length from the device. What lies after the last document is taken for
    one more, which sees nothing, so that its output and gradients are 0.
    """
    own_start = 0
    other_start = 0
    low = 0
    if PACKED:
        high = n_documents + 1
        while high - low > 1:
            middle = (low + high) // 2
            fits = tl.load(own_offsets_ptr + middle) // BLOCK + middle <= block
            low = tl.where(fits, middle, low)
            high = tl.where(fits, high, middle)
        own_start = tl.load(own_offsets_ptr + low)
        other_start = tl.load(other_offsets_ptr + low)
        following = tl.minimum(low + 1, n_documents)
        own_end = tl.where(low < n_documents, tl.load(own_offsets_ptr + following), own_length)
        block -= own_start // BLOCK + low
        own_length = own_end - own_start
        other_length = tl.load(other_offsets_ptr + following) - other_start
    return own_start, own_length, other_start, other_length, block, low


@triton.jit
def span(
    first, last, shift, other_length, before, after, BLOCK: tl.constexpr, HAS_BEFORE: tl.constexpr,
    HAS_AFTER: tl.constexpr,
):  # fmt: skip
    """What own rows `first` to `last` (included) see: (begin, full_begin, full_end, end).

    Row i sees other rows i + shift - before to i + shift + after. Blocks of [begin, full_begin) and [full_end, end)
    hold pairs that do not see each other; those of [full_begin, full_end) hold none.
    """
    low = 0
    full_low = 0
    end = other_length
    full_end = other_length
    if HAS_BEFORE:
        low = tl.maximum(first + shift - before, 0)
        full_low = tl.maximum(last + shift - before, 0)
    if HAS_AFTER:
        end = tl.minimum(last + shift + after + 1, other_length)
        full_end = tl.minimum(first + shift + after + 1, other_length)
    begin = low // BLOCK * BLOCK
    full_begin = tl.minimum(tl.cdiv(full_low, BLOCK), tl.cdiv(tl.maximum(end, 0), BLOCK)) * BLOCK
    full_begin = tl.maximum(full_begin, begin)
    full_end = tl.maximum(tl.maximum(full_end, 0) // BLOCK * BLOCK, full_begin)
    return begin, full_begin, full_end, end


@triton.jit
def sees(keys, distance, length_k, left, right, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr):
    """Whether queries may see `keys`; distance = keys - rows - shift, from a query's own position, shift = Sk - Sq."""
    visible = keys < length_k
    if HAS_LEFT:
        visible &= distance >= -left
    if HAS_RIGHT:
        visible &= distance <= right
    return visible


@triton.jit
def load_rows(base_ptr, start, stride, length, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
              MASKED: tl.constexpr):  # fmt: skip
    """Rows `start` and following of one head as [BLOCK, BLOCK_D], 0 outside of [0, length) x [0, HEAD_DIM)."""
    offs_row = tl.arange(0, BLOCK)[:, None]
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    pointers = base_ptr + tl.cast(start, tl.int64) * stride + (offs_row * stride + offs_d)
    if MASKED and HEAD_DIM < BLOCK_D:
        return tl.load(pointers, mask=(start + offs_row < length) & (offs_d < HEAD_DIM), other=0.0)
    elif MASKED:
        return tl.load(pointers, mask=start + offs_row < length, other=0.0)
    elif HEAD_DIM < BLOCK_D:
        return tl.load(pointers, mask=offs_d < HEAD_DIM, other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def store_rows(base_ptr, start, stride, length, values, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr,
               BLOCK_D: tl.constexpr):  # fmt: skip
    """The opposite of load_rows, with masks always."""
    offs_row = tl.arange(0, BLOCK)[:, None]
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    pointers = base_ptr + tl.cast(start, tl.int64) * stride + (offs_row * stride + offs_d)
    mask = (start + offs_row < length) & (offs_d < HEAD_DIM)
    tl.store(pointers, values.to(base_ptr.dtype.element_ty), mask=mask)
