"""Sequence parallelism (Jacobs et al., "DeepSpeed Ulysses", 2023): each rank has a part of every row of tokens.

    all but attention       tokens [T / n], all heads
    attention               all-to-all -> tokens [T], heads / n -> attention -> all-to-all -> tokens [T / n], all heads

The exchange is DeepSpeed's. Attention sees whole rows, so packed documents, windows and kernels are as on one rank.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from deepspeed.sequence.layer import DistributedAttention
from torch import nn

from tilestack.distributed.config import SettingsError
from tilestack.models import Qwen3MoeForCausalLM
from tilestack.models.registration import NAME
from tilestack.models.sharded_sequence import Attend

IGNORED = -100


class Ulysses:
    """A ShardedSequence over torch.distributed."""

    def __init__(self, group: dist.ProcessGroup, rank: int, ranks: int):
        self.group, self.rank, self.ranks = group, rank, ranks

    def attend(self, attention: Attend, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if k.shape[2] < self.ranks:  # a rank has at least one key head: shared ones are copied
            copies = self.ranks // k.shape[2]
            k, v = (each.repeat_interleave(copies, dim=2) for each in (k, v))
        exchange = DistributedAttention(_Function(attention), self.group, scatter_idx=2, gather_idx=1)
        return exchange(q.contiguous(), k.contiguous(), v.contiguous(), 0)

    def sum(self, statistic: torch.Tensor) -> torch.Tensor:
        total = statistic.detach().clone()
        dist.all_reduce(total, group=self.group)
        return total + self.ranks * (statistic - statistic.detach())

    def share(self, batch: dict) -> dict:
        """This rank's part of a micro-batch that all ranks have; labels are shifted before they are cut.

        A row whose length the ranks do not divide is filled up with one more document, without labels; a mask tells
        the load-balancing loss.
        """
        tokens, labels, offsets = batch["input_ids"], batch["labels"], batch["cu_seqlens"]
        missing = -tokens.shape[1] % self.ranks
        labels = F.pad(labels[:, 1:], (0, 1 + missing), value=IGNORED)
        positions = batch["position_ids"]
        if missing:
            tokens = F.pad(tokens, (0, missing))
            filling = torch.arange(missing, dtype=positions.dtype, device=positions.device)
            positions = torch.cat([positions, filling[None]], 1)
            offsets = torch.cat([offsets, offsets[-1:] + missing])
        whole = {"input_ids": tokens, "shift_labels": labels, "position_ids": positions}
        if missing:
            whole["attention_mask"] = F.pad(torch.ones_like(batch["input_ids"]), (0, missing))
        parts = {name: each.chunk(self.ranks, 1)[self.rank] for name, each in whole.items()}
        return batch | {"labels": None, "cu_seqlens": offsets} | parts


class _Function(nn.Module):
    """DeepSpeed's exchange takes a module."""

    def __init__(self, function: Attend):
        super().__init__()
        self.function = function

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return self.function(q, k, v)


def shard_sequences(model: Qwen3MoeForCausalLM, sequence: Ulysses) -> None:
    """Make the model expect its rank's part of every row.

    Raises SettingsError if attention does not run on our op.
    """
    implementation = model.config._attn_implementation
    if implementation != NAME:
        raise SettingsError(
            "distributed.sequence_parallel shares out the heads of tilestack's own attention, but the model was built "
            f"with attn_implementation={implementation!r}"
        )
    model.shard_sequence(sequence)
