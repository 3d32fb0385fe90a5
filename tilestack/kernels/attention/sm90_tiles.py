"""How TMA reads the tensors of attention: [B, S, H, D] or [T, H, D] as rows of heads, in tiles."""

from __future__ import annotations

import math

import torch

from tilestack.kernels._gluon import TensorDescriptor, Tiles, tensor_descriptor
from tilestack.kernels.attention.layout import rows_by_heads

Pair = tuple[TensorDescriptor, TensorDescriptor | None]


class RowTiles:
    """Descriptors of tensors of one shape and dtype, worked out once: tiles of `rows` rows and `columns` columns.

    rest: columns of a second tile beside them, of a head dimension that is no power of two; 0 is none.
    """

    def __init__(self, shape: torch.Size, dtype: torch.dtype, rows: int, columns: int, rest: int):
        *leading, heads, head_dim = shape
        size = math.prod(leading), heads * head_dim
        self._strides = torch.empty(shape, device="meta").stride()
        self._forms = [([rows, columns], 128)] + ([([rows, rest], min(128, 2 * rest))] if rest else [])
        self._tiles = [Tiles(size, (size[1], 1), dtype, block, width) for block, width in self._forms]

    def of(self, tensor: torch.Tensor) -> Pair:
        """The descriptors; of a copy, where TMA cannot describe the tensor."""
        if tensor.stride() == self._strides and tensor.data_ptr() % 16 == 0:
            found = [each.of(tensor) for each in self._tiles]
        else:
            seen = rows_by_heads(tensor)
            found = [tensor_descriptor(seen, block, width) for block, width in self._forms]
        return found[0], found[1] if len(found) > 1 else None
