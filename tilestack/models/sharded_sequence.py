"""The seam for sequence parallelism: what the model asks of ranks that each have a part of every sequence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class ShardedSequence(Protocol):
    """The ranks that share each row of tokens: rank i has the i-th of `ranks` equal parts. A model alone has none."""

    ranks: int

    def attend(self, attention: Attend, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Attention of this rank's queries to the keys of all ranks.

        attention: the op, of whole rows and some heads: q [B, S, Hq, D], k and v [B, S, Hkv, D] -> [B, S, Hq, D].
        q: [B, S / ranks, heads of q, D]; k, v: [B, S / ranks, heads of k, D].

        Returns [B, S / ranks, heads of q, D].
        """

    def sum(self, statistic: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks. Backward: `ranks` times the gradient of the rank's own term.

        Every rank makes the same loss of the sums, and the ranks' losses are averaged: this makes up for it.
        """
