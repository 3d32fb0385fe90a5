"""Expert parallelism: each rank of a group holds some experts of every layer, and tokens travel to them.

    home                                         owner of experts [first, first + E / ranks)
    x [T, H], ids, weights --- all-to-all --->   rows [R, H], ids, weights
                                                 partial[r] = sum over the row's own experts of weight * expert(row)
    out[t] = sum of its partials  <-- all-to-all --

A token travels once to each rank that has one of its experts, not once for each expert: at 8 of 128 experts over 4
ranks 3.6 rows instead of 8. The owner applies the routing weights, so that one row comes back too; their gradients
travel home with the rows' (a third, small all-to-all). Partials are summed in float32 in the order of the ranks: the
same input gives the same bits.

How many rows go where is counted on the device and exchanged there, but the collective wants the sizes on the host: one
wait a layer in the forward pass, and another where activation checkpointing makes the layer again (the README says why,
and what it would take not to). Tokens go in `chunks`: while the experts work on one, the next travels (forward and
backward).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts, Qwen3MoeSparseMoeBlock

from tilestack.distributed.config import SettingsError
from tilestack.models.registration import NAME
from tilestack.models.token_dispatch import Experts

ROUTES = 256  # the bound on the experts' routes is a multiple of it, so that memory of few sizes is asked for
EXPERT_WEIGHTS = ("gate_up_proj", "down_proj")


@dataclass(frozen=True)
class ExpertGroup:
    """The ranks among which a layer's experts are split.

    group: their process group. rank, size: this rank's place in it, and how many there are.
    name: what DeepSpeed calls the group.
    """

    group: dist.ProcessGroup
    rank: int
    size: int
    name: str

    def share(self, experts: int) -> tuple[int, int]:
        """(first, count) of this rank's experts."""
        count = experts // self.size
        return self.rank * count, count


class AllToAllDispatcher:
    """A TokenDispatcher over torch.distributed. See the module.

    chunks: the tokens travel in so many parts, each while the experts work on the one before.
    """

    def __init__(self, members: ExpertGroup, num_experts: int, chunks: int = 1):
        self.members, self.chunks = members, chunks
        self.under_way: list[_Journey] = []
        self.first, self.experts_per_rank = members.share(num_experts)

    def __call__(
        self, x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor, experts: Experts
    ) -> torch.Tensor:
        chunks = list(self._plan(topk_ids))
        on_the_way = []
        for chunk in chunks:
            rows = _Spread.apply(x[chunk.begin : chunk.end], chunk)
            weights, ids = topk_weights[chunk.begin : chunk.end], topk_ids[chunk.begin : chunk.end]
            journey = _Journey(self.members.group, chunk.sent, chunk.received, self.under_way)
            flying = _Depart.apply(journey, rows, weights[chunk.tokens], ids[chunk.tokens])
            on_the_way.append((journey, flying))
        going_back = []
        for chunk, (journey, flying) in zip(chunks, on_the_way, strict=True):
            rows, weights, ids = _Arrive.apply(journey, *flying)
            partial = experts(rows, ids - self.first, weights, chunk.routes)
            journey = _Journey(self.members.group, chunk.received, chunk.sent, self.under_way)
            going_back.append((journey, _Depart.apply(journey, partial)))
        return torch.cat(
            [
                _Collect.apply(*_Arrive.apply(journey, *flying), chunk)
                for chunk, (journey, flying) in zip(chunks, going_back, strict=True)
            ]
        )

    def _plan(self, topk_ids: torch.Tensor) -> Iterator[_Chunk]:
        """What each chunk sends where. Waits for the device once, for the sizes of all chunks."""
        ranks = self.members.size
        begins = [len(topk_ids) * i // self.chunks for i in range(self.chunks + 1)]
        owners = (topk_ids // self.experts_per_rank).long()
        goes = torch.zeros(len(topk_ids), ranks, dtype=torch.bool, device=topk_ids.device)
        goes.scatter_(1, owners, True)
        spans = list(zip(begins, begins[1:], strict=False))
        parts = [goes[begin:end] for begin, end in spans]
        routes = [_count(owners[begin:end], ranks) for begin, end in spans]
        # [ranks, 2, chunks]: how many rows go to each rank, and how many routes they have there
        sent = torch.stack([torch.stack([part.sum(0) for part in parts], 1), torch.stack(routes, 1)], 1)
        received = torch.empty_like(sent)
        exchange = dist.all_to_all_single(received, sent, group=self.members.group, async_op=True)
        # the tokens of rank 0, then of rank 1, ...: a sort, as nonzero() would wait for the device. It comes before
        # the host waits: afterwards the device has nothing to do until the host has launched what follows
        orders = [part.t().flatten().logical_not().byte().argsort(stable=True) % max(len(part), 1) for part in parts]
        exchange.wait()
        sizes = torch.stack([sent, received]).tolist()
        for i, order in enumerate(orders):
            to, of = ([rank[0][i] for rank in side] for side in sizes)
            here = sum(rank[1][i] for rank in sizes[1])
            most = -(-here // ROUTES) * ROUTES
            yield _Chunk(begins[i], begins[i + 1], order[: sum(to)], to, of, most)


def _count(owners: torch.Tensor, ranks: int) -> torch.Tensor:
    """[ranks]: how many of the routes [T, K] each rank owns, on the device."""
    counts = torch.zeros(ranks, dtype=torch.int64, device=owners.device)
    return counts.scatter_add_(0, owners.flatten(), torch.ones_like(owners).flatten())


@dataclass(frozen=True)
class _Chunk:
    """Tokens [begin, end) of this rank: which rows it sends (their tokens, counted from begin, rank by rank).

    routes: a bound on those that the rows it receives have to its own experts.
    """

    begin: int
    end: int
    tokens: torch.Tensor
    sent: list[int]
    received: list[int]
    routes: int

    def spread(self, x: torch.Tensor) -> torch.Tensor:
        """[T, H] of the chunk's tokens -> [S, H], one row for each rank that a token goes to."""
        return x.index_select(0, self.tokens)

    def collect(self, rows: torch.Tensor) -> torch.Tensor:
        """The sum of each token's rows, in float32 in the order of the ranks; a token goes to a rank at most once."""
        total = rows.new_zeros(
            self.end - self.begin, rows.shape[1], dtype=torch.promote_types(rows.dtype, torch.float32)
        )
        for tokens, of_rank in zip(self.tokens.split(self.sent), rows.split(self.sent), strict=True):
            total.index_add_(0, tokens, of_rank.to(total.dtype))
        return total.to(rows.dtype)


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, chunk: _Chunk) -> torch.Tensor:
        ctx.chunk = chunk
        return chunk.spread(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple:
        return ctx.chunk.collect(grad), None


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, chunk: _Chunk) -> torch.Tensor:
        ctx.chunk = chunk
        return chunk.collect(rows)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple:
        return ctx.chunk.spread(grad), None


class _Journey:
    """Rows on their way to other ranks, and later their gradients on the way home.

    sent, received: how many rows go to each rank, and come from it.
    under_way: the layer's journeys that nobody has waited for yet, without those of gradients.
    """

    def __init__(self, group: dist.ProcessGroup, sent: list[int], received: list[int], under_way: list[_Journey]):
        self.group, self.sent, self.received, self.under_way = group, sent, received, under_way
        self._work: list[dist.Work] = []
        self.gradients: list[torch.Tensor | None] = []

    def start(self, tensors: tuple[torch.Tensor, ...], home: bool = False) -> tuple[torch.Tensor, ...]:
        """Begin to send; what is returned is there after `finish`."""
        to, of = (self.received, self.sent) if home else (self.sent, self.received)
        landed = tuple(each.new_empty(sum(of), *each.shape[1:]) for each in tensors)
        self._work = [
            dist.all_to_all_single(there, here.contiguous(), of, to, group=self.group, async_op=True)
            for there, here in zip(landed, tensors, strict=True)
        ]
        if not home:
            self.under_way.append(self)
        return landed

    def finish(self) -> None:
        for work in self._work:
            work.wait()
        self._work = []
        if self in self.under_way:
            self.under_way.remove(self)

    def finish_all(self) -> None:
        """Wait for what the layer has sent and nobody will read.

        Activation checkpointing makes a layer again until the backward has what it needs: the last part's experts ran,
        and the way home of the parts before has begun.
        """
        for each in tuple(self.under_way):
            each.finish()


class _Depart(torch.autograd.Function):
    """Begin to send; the result must not be read before _Arrive. Backward: the gradients have come home."""

    @staticmethod
    def forward(ctx: Any, journey: _Journey, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.journey = journey
        landed = journey.start(tensors)
        ctx.mark_non_differentiable(*[each for each in landed if not each.is_floating_point()])
        return landed

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> tuple:
        ctx.journey.finish()
        gradients, ctx.journey.gradients = ctx.journey.gradients, []
        return None, *gradients


class _Arrive(torch.autograd.Function):
    """Wait for what _Depart began. Backward: begin to send the gradients home, for which _Depart's backward waits."""

    @staticmethod
    def forward(ctx: Any, journey: _Journey, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.journey = journey
        ctx.differentiable = [each.is_floating_point() for each in tensors]
        journey.finish()
        landed = tuple(each.view_as(each) for each in tensors)
        ctx.mark_non_differentiable(*[each for each in landed if not each.is_floating_point()])
        return landed

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple:
        ctx.journey.finish_all()
        leaving = tuple(grad for grad, differs in zip(grads, ctx.differentiable, strict=True) if differs)
        home = iter(ctx.journey.start(leaving, home=True))
        ctx.journey.gradients = [next(home) if differs else None for differs in ctx.differentiable]
        # autograd hands these on to _Depart, which takes those that come home instead
        return None, *[grad if differs else None for grad, differs in zip(grads, ctx.differentiable, strict=True)]


def split_experts(model: nn.Module, members: ExpertGroup, chunks: int) -> None:
    """Leave only this rank's experts in every MoE layer of the model, and send tokens to the others.

    Raises SettingsError if the experts do not run on our op.
    """
    for block in model.modules():
        if not isinstance(block, Qwen3MoeSparseMoeBlock):
            continue
        if block.experts.config._experts_implementation != NAME:
            raise SettingsError(
                "distributed.expert_parallel sends tokens to tilestack's own experts, but the model was built with "
                f"experts_implementation={block.experts.config._experts_implementation!r}"
            )
        experts = block.experts.num_experts
        first, count = members.share(experts)
        for name in EXPERT_WEIGHTS:
            whole = getattr(block.experts, name)
            own = nn.Parameter(whole.detach()[first : first + count].clone(), requires_grad=whole.requires_grad)
            own.allreduce, own.group_name = False, members.name  # how DeepSpeed knows the weights of experts
            setattr(block.experts, name, own)
        block.dispatcher = AllToAllDispatcher(members, experts, chunks)


def split_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights of which each rank of the group has a part, by name."""
    modules = [(name, each) for name, each in model.named_modules() if isinstance(each, Qwen3MoeExperts)]
    return {f"{path}.{name}": getattr(module, name) for path, module in modules for name in EXPERT_WEIGHTS}
