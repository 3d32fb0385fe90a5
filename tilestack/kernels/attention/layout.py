"""What the implementations of attention share about the shapes of their tensors."""

from __future__ import annotations

import torch


def empty_lse(q: torch.Tensor) -> torch.Tensor:
    """[B, Hq, Sq] for dense q, [Hq, Tq] for packed; float32, or float64 where q is."""
    *batch, length, heads, _ = q.shape
    return q.new_empty((*batch, heads, length), dtype=torch.promote_types(q.dtype, torch.float32))


def rows_by_heads(tensor: torch.Tensor) -> torch.Tensor:
    """View (or, where strides forbid it, copy) [B, S, H, D] or [T, H, D] as [rows, H * D], which TMA can describe.

    TMA wants heads side by side, rows at a constant stride of a multiple of 16 bytes, and a start at such a multiple.
    Rows that lie over one another (the gradient of a sum over rows is expanded, with stride 0) are copied too.
    """
    *leading, heads, head_dim = tensor.shape
    if tensor.is_contiguous() and tensor.data_ptr() % 16 == 0 and heads * head_dim * tensor.element_size() % 16 == 0:
        return tensor.view(-1, heads * head_dim)
    *outer, row, head, last = tensor.stride()
    aligned = row * tensor.element_size() % 16 == 0 and tensor.data_ptr() % 16 == 0
    regular = not outer or leading[0] == 1 or outer[0] == leading[1] * row
    apart = row >= heads * head_dim or torch.Size(leading).numel() <= 1
    if not (last == 1 and (head == head_dim or heads == 1) and aligned and regular and apart):
        tensor = tensor.clone(memory_format=torch.contiguous_format)  # also where it only begins at a wrong place
        row = heads * head_dim
    return tensor.as_strided((torch.Size(leading).numel(), heads * head_dim), (row, 1))


def pad_heads(tensor: torch.Tensor, width: int) -> torch.Tensor:
    """[..., D] as it is, or copied to [..., width] with zeros behind D."""
    missing = width - tensor.shape[-1]
    return torch.nn.functional.pad(tensor, (0, missing)) if missing else tensor
