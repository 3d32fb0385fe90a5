"""The seam for expert parallelism: who carries a layer's tokens to the experts that the router chose."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

Experts = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int], torch.Tensor]


class TokenDispatcher(Protocol):
    """Runs a layer's experts where each rank holds a part of them. The block has none where all experts are here."""

    def __call__(
        self, x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor, experts: Experts
    ) -> torch.Tensor:
        """What `experts(x, topk_ids, topk_weights)` would give if this rank had all of them.

        x: [T, H], this rank's tokens. topk_ids: [T, K], numbers among all experts. topk_weights: [T, K].
        experts: this rank's own: (rows [R, H], ids [R, K], weights [R, K], most) -> [R, H]; ids count from its first
            expert, and one outside its experts adds 0. At most `most` ids are of its experts: the memory that the
            experts take is of this size, where R * K would be several times as much.

        Returns [T, H]; differentiable in x and topk_weights, and in the experts' weights through `experts`.
        """
