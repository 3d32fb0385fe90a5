"""How the tokens of a batch fall into documents, worked out once per forward."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Packing:
    """The documents of a batch [B, S], flattened to B * S tokens.

    cu_seqlens: int32 [n + 1], where each document begins among the tokens that count, then their number.
    max_seqlen: no document is longer; None is unknown.
    indices: int64 [tokens that count], where they lie among the B * S; None if all count.
    """

    cu_seqlens: torch.Tensor
    max_seqlen: int | None = None
    indices: torch.Tensor | None = None

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """[B, S, heads, D] -> [tokens that count, heads, D]."""
        flat = tensor.flatten(0, 1)
        return flat if self.indices is None else flat.index_select(0, self.indices)

    def scatter(self, packed: torch.Tensor, batch: int, seqlen: int) -> torch.Tensor:
        """[tokens that count, heads, D] -> [B, S, heads, D], 0 where a token does not count."""
        if self.indices is not None:
            empty = packed.new_zeros((batch * seqlen, *packed.shape[1:]))
            packed = empty.index_copy(0, self.indices, packed)
        return packed.view(batch, seqlen, *packed.shape[1:])


def find_packing(
    batch: int,
    seqlen: int,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    max_seqlen: int | None = None,
) -> Packing | None:
    """The documents of a batch of `batch` rows of `seqlen` tokens; None if every row is one whole document.

    attention_mask: [B, S], 0 for a token that does not count (padding).
    position_ids: [B or 1, S]. A document begins where they do not go on by 1, as transformers has it. Across masked
        tokens they may also go on by the number of tokens passed.
    cu_seqlens, max_seqlen: where the documents begin among all B * S tokens, if the loader knows. They win over
        the other two, and nothing is read from the device; without them, a mask or positions cost a synchronisation.

    Raises ValueError if cu_seqlens does not fit the batch (its values are looked at on a CPU only) or nothing counts.
    """
    if cu_seqlens is not None:
        _check_cu_seqlens(cu_seqlens, batch * seqlen)
        return Packing(cu_seqlens.to(torch.int32), max_seqlen)
    indices = None if attention_mask is None else _indices_that_count(attention_mask)
    if position_ids is None and indices is None:
        return None
    if position_ids is None:
        position_ids = torch.arange(seqlen, device=attention_mask.device).unsqueeze(0)
    starts = _starts(position_ids.expand(batch, seqlen), indices)
    if indices is None and len(starts) == batch:
        return None
    end = starts.new_full((1,), batch * seqlen if indices is None else len(indices))
    return Packing(torch.cat([starts, end]).to(torch.int32), seqlen, indices)


def positions_of(cu_seqlens: torch.Tensor, batch: int, seqlen: int) -> torch.Tensor:
    """position_ids [B, S] that begin with 0 in every document; no synchronisation."""
    _check_cu_seqlens(cu_seqlens, batch * seqlen)
    token = torch.arange(batch * seqlen, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    document = torch.searchsorted(cu_seqlens, token, right=True) - 1
    return (token - cu_seqlens[document]).long().view(batch, seqlen)


def _check_cu_seqlens(cu_seqlens: torch.Tensor, tokens: int) -> None:
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 2 or cu_seqlens.is_floating_point():
        raise ValueError(
            f"cu_seq_lens_q must be integers [documents + 1], got {cu_seqlens.dtype} {list(cu_seqlens.shape)}"
        )
    readable = cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling()
    if readable and (cu_seqlens[0] != 0 or cu_seqlens[-1] != tokens):
        raise ValueError(
            f"cu_seq_lens_q must go from 0 to the number of tokens of the batch ({tokens}), "
            f"got {int(cu_seqlens[0])} to {int(cu_seqlens[-1])}; make padding a document of its own"
        )


def _indices_that_count(attention_mask: torch.Tensor) -> torch.Tensor | None:
    indices = attention_mask.flatten().nonzero().flatten()
    if len(indices) == 0:
        raise ValueError("attention_mask must have a token that counts, got zeros alone")
    return None if len(indices) == attention_mask.numel() else indices


def _starts(position_ids: torch.Tensor, indices: torch.Tensor | None) -> torch.Tensor:
    """Where documents begin among the tokens that count."""
    seqlen = position_ids.shape[1]
    positions = position_ids.flatten()
    place = torch.arange(positions.numel(), device=positions.device) if indices is None else indices
    positions = positions[place]
    step, passed = positions.diff(), place.diff()
    same_row = (place // seqlen).diff() == 0
    begins = ~(same_row & ((step == 1) | (step == passed)))
    return torch.cat([begins.new_ones(1), begins]).nonzero().flatten()
