"""Between padded batches and packed tokens: flash_attn.bert_padding.

A mask says which positions of a padded batch [B, S, ...] hold a token; their rows, one after the other, are the packed
form [total, ...], and `indices` are where they lie in the batch, flattened.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  (torch's own habit)

__all__ = [
    "IndexFirstAxis",
    "IndexFirstAxisResidual",
    "IndexPutFirstAxis",
    "index_first_axis",
    "index_first_axis_residual",
    "index_put_first_axis",
    "pad_input",
    "unpad_input",
    "unpad_input_for_concatenated_sequences",
]


def __getattr__(name: str) -> Any:
    """flash-attn's module also shows einops' rearrange and repeat, and some projects import them from here."""
    if name in ("rearrange", "repeat"):
        try:
            import einops
        except ImportError:
            raise ImportError(f"flash_attn.bert_padding.{name} is einops.{name}: pip install einops") from None
        return getattr(einops, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class IndexFirstAxis(torch.autograd.Function):
    """Rows `indices` of `input`, [N, ...] -> [n, ...]; each row is asked for at most once."""

    @staticmethod
    def forward(ctx: Any, input: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(indices)
        ctx.rows = input.shape[0]
        return input.index_select(0, indices)

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple:
        (indices,) = ctx.saved_tensors
        return _scatter(grad_output, indices, ctx.rows), None


class IndexPutFirstAxis(torch.autograd.Function):
    """`values` [n, ...] as rows `indices` of zeros [first_axis_dim, ...]; each row is written at most once."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, indices: torch.Tensor, first_axis_dim: int) -> torch.Tensor:
        ctx.save_for_backward(indices)
        return _scatter(values, indices, first_axis_dim)

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple:
        (indices,) = ctx.saved_tensors
        return grad_output.index_select(0, indices), None, None


class IndexFirstAxisResidual(torch.autograd.Function):
    """IndexFirstAxis that also returns the input itself, detached; both gradients are added in one tensor."""

    @staticmethod
    def forward(ctx: Any, input: torch.Tensor, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(indices)
        return input.index_select(0, indices), input.detach()

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor, grad_residual: torch.Tensor) -> tuple:
        (indices,) = ctx.saved_tensors
        return grad_residual.index_add(0, indices, grad_output), None


def _scatter(values: torch.Tensor, indices: torch.Tensor, rows: int) -> torch.Tensor:
    # No atomics and no sort, unlike index_select's own backward: the indices are distinct. Where there is one query a
    # sequence, transformers' are int32.
    return values.new_zeros(rows, *values.shape[1:]).index_copy_(0, indices.long(), values)


index_first_axis = IndexFirstAxis.apply
index_put_first_axis = IndexPutFirstAxis.apply
index_first_axis_residual = IndexFirstAxisResidual.apply


def unpad_input(
    hidden_states: torch.Tensor, attention_mask: torch.Tensor, unused_mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int, torch.Tensor]:
    """Take the tokens out of a padded batch.

    hidden_states: [B, S, ...].
    attention_mask: [B, S], 1 (or True) where there is a token.
    unused_mask: [B, S], 1 where a token is allocated but not used: it is packed and counted in cu_seqlens, and not
        counted in seqused.

    Returns (tokens [total, ...], indices [total] int64, cu_seqlens [B + 1] int32, max_seqlen, seqused [B] int32).
    Reads the mask on the host.
    """
    packed_mask = attention_mask if unused_mask is None else attention_mask + unused_mask
    seqused = attention_mask.sum(-1, dtype=torch.int32)
    lengths = packed_mask.sum(-1, dtype=torch.int32)
    indices = packed_mask.flatten().nonzero().flatten()
    tokens = index_first_axis(hidden_states.flatten(0, 1), indices)
    return tokens, indices, _offsets(lengths), int(lengths.max()), seqused


def unpad_input_for_concatenated_sequences(
    hidden_states: torch.Tensor, attention_mask_in_length: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """Take the tokens out of a padded batch whose rows each hold several sequences, one after the other.

    hidden_states: [B, S, ...].
    attention_mask_in_length: [B, S]: each row begins with the lengths of its sequences; zeros follow.

    Returns (tokens [total, ...], indices [total] int64, cu_seqlens [sequences + 1] int32, max_seqlen). Reads the
    lengths on the host.
    """
    lengths = attention_mask_in_length.flatten()
    lengths = lengths[lengths > 0].to(torch.int32)
    positions = torch.arange(attention_mask_in_length.shape[1], device=attention_mask_in_length.device)
    filled = positions < attention_mask_in_length.sum(-1, keepdim=True)
    indices = filled.flatten().nonzero().flatten()
    tokens = index_first_axis(hidden_states.flatten(0, 1), indices)
    return tokens, indices, _offsets(lengths), int(lengths.max())


def _offsets(lengths: torch.Tensor) -> torch.Tensor:
    return F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))


def pad_input(hidden_states: torch.Tensor, indices: torch.Tensor, batch: int, seqlen: int) -> torch.Tensor:
    """Put packed tokens back: [total, ...] -> [batch, seqlen, ...], zeros where there is no token."""
    padded = index_put_first_axis(hidden_states, indices, batch * seqlen)
    return padded.unflatten(0, (batch, seqlen))
