"""Where DeepSpeed keeps this rank's part of each parameter's float32 weights and optimizer state.

DeepSpeed's own checkpoints are pickles and belong to the number of ranks that wrote them; with these views a checkpoint
is made of pieces instead (checkpoint.py). What is known, of DeepSpeed 0.19: ZeRO-1 and 2 (`DeepSpeedZeroOptimizer`, and
`BF16_Optimizer` in bfloat16 with float32 accumulation), ZeRO-3, and without ZeRO the bare optimizer (float32) and
`FP16_UnfusedOptimizer` or, over DeepSpeed's own fused Adam, `FP16_Optimizer` (bfloat16). Most of them flatten many
parameters into one tensor, which the optimizer's state then belongs to.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from tilestack.distributed.checkpoint import MOMENTS, WEIGHT, CheckpointError, Piece
from tilestack.distributed.optimizer import AdamW, readable, take_up


@dataclass(frozen=True)
class _Part:
    """`numel` elements of a parameter from `start` on, which lie at `offset` of a flat tensor."""

    parameter: torch.nn.Parameter
    start: int
    offset: int
    numel: int


class OptimizerState:
    """The float32 weights and the state of the optimizer inside a DeepSpeedEngine, on this rank.

    names: the model's parameters by identity (`id`).
    begins: of a parameter that is a part of a larger one: the number of its first element there.

    Raises CheckpointError if the optimizer is none whose state is known.
    """

    def __init__(self, engine: Any, names: Mapping[int, str], begins: Mapping[str, int]):
        self.names, self.begins = names, begins
        self.zero = engine.optimizer
        self.stage = engine.zero_optimization_stage()
        self.base = getattr(self.zero, "optimizer", self.zero)
        is_adam = all({"betas", "eps"} <= set(group) for group in self.base.param_groups)
        if not is_adam or any(group.get("amsgrad") for group in self.base.param_groups):
            raise CheckpointError(f"the state of {type(self.base).__name__} cannot be saved: only Adam's is known")

    @property
    def updates(self) -> int:
        """How many updates were made."""
        for flat, _, _ in self._flats():
            return int(self.base.state.get(flat, {}).get("step", 0))
        return 0

    def pieces(self, loading: bool = False, decoded: bool = True) -> Iterator[Piece]:
        """What this rank holds. A state that is not there yet, before the first update, is made: zero.

        loading: take up what was written to the pieces of a flat tensor, when the next one's are asked for.
        decoded: see `readable`.
        """
        for flat, parts, group in self._flats():
            state = self._state(flat, group)
            moments = readable(state, decoded)
            kinds = {WEIGHT: flat.detach()} | moments
            for part in parts:
                name = self.names[id(part.parameter)]
                tensors = {kind: each.view(-1).narrow(0, part.offset, part.numel) for kind, each in kinds.items()}
                yield Piece(name, self.begins.get(name, 0) + part.start, tensors)
            if loading:
                take_up(state, moments)

    def _state(self, flat: torch.Tensor, group: dict) -> dict[str, Any]:
        if isinstance(self.base, AdamW):
            return self.base.start(flat)
        state = self.base.state[flat]
        if not state:
            state |= {kind: torch.zeros_like(flat) for kind in MOMENTS}
            self._set_step(state, group, flat, 0)
        return state

    def restart(self) -> None:
        """No update was made yet: whatever state there is counts from 0."""
        for flat, _, group in self._flats():
            if self.base.state[flat]:
                self._set_step(self.base.state[flat], group, flat, 0)

    def publish(self, updates: int) -> None:
        """After the pieces' tensors were written: set the count, and give the model the weights. A collective."""
        for flat, _, group in self._flats():
            self._set_step(self.base.state[flat], group, flat, updates)
        if self.stage == 3:
            self._publish_partitions()
        elif self.stage > 0:
            self.zero.update_lp_params()
        elif self.zero is not self.base:
            with torch.no_grad():
                for master, parts, _ in self._flats():
                    for part in parts:
                        weights = master.view(-1).narrow(0, part.offset, part.numel)
                        part.parameter.copy_(weights.view_as(part.parameter))

    def _set_step(self, state: dict, group: dict, flat: torch.Tensor, updates: int) -> None:
        if "step" in group:  # DeepSpeed's fused Adam, which counts in the state too
            group["step"] = updates
        if isinstance(self.base, (torch.optim.Adam, torch.optim.AdamW)):
            on_device = group.get("fused") or group.get("capturable")
            state["step"] = torch.tensor(float(updates), device=flat.device if on_device else "cpu")
        else:
            state["step"] = updates

    def _flats(self) -> Iterator[tuple[torch.Tensor, list[_Part], dict]]:
        """(flat tensor, which parts of parameters lie in it, the optimizer's group)."""
        groups, zero = self.base.param_groups, self.zero
        if self.stage == 3:
            for index, flat in enumerate(zero.fp32_partitioned_groups_flat):
                parts = [self._partition(each) for each in zero.fp16_groups[index]]
                yield flat, [part for part in parts if part.numel > 0], groups[zero.sub_group_to_group_id[index]]
        elif self.stage > 0:
            is_bf16_optimizer = hasattr(zero, "bf16_groups")
            flats = zero.fp32_groups_flat_partition if is_bf16_optimizer else zero.single_partition_of_fp32_groups
            low = zero.bf16_groups if is_bf16_optimizer else zero.bit16_groups
            for index, flat in enumerate(flats):
                linked = [(each, each._hp_mapping) for each in low[index] if each._hp_mapping is not None]
                parts = [
                    _Part(
                        each, at.lp_fragment_address.start, at.hp_fragment_address.start, at.hp_fragment_address.numel
                    )
                    for each, at in linked
                ]
                yield flat, parts, groups[index]
        else:
            yield from self._whole_parameters()

    def _whole_parameters(self) -> Iterator[tuple[torch.Tensor, list[_Part], dict]]:
        groups, zero = self.base.param_groups, self.zero
        if zero is self.base:
            for group in groups:
                for parameter in group["params"]:
                    yield parameter, [_Part(parameter, 0, 0, parameter.numel())], group
        elif hasattr(zero, "fp32_groups"):  # a master for each parameter
            for group, low, masters in zip(groups, zero.fp16_groups, zero.fp32_groups, strict=True):
                for parameter, master in zip(low, masters, strict=True):
                    yield master, [_Part(parameter, 0, 0, parameter.numel())], group
        else:
            for group, low, flat in zip(groups, zero.fp16_groups, zero.fp32_groups_flat, strict=True):
                ends = list(itertools.accumulate(parameter.numel() for parameter in low))
                yield flat, [_Part(p, 0, end - p.numel(), p.numel()) for p, end in zip(low, ends, strict=True)], group

    def _partition(self, parameter: torch.nn.Parameter) -> _Part:
        """ZeRO-3: each rank has an equal part of the parameter; the last ones may have less than that, or nothing."""
        _, offset, numel = self.zero.grad_position[self.zero.get_param_id(parameter)]
        start = numel * self.zero._get_param_partition_rank(parameter)
        return _Part(parameter, start, offset, max(0, min(numel, parameter.ds_numel - start)))

    def _publish_partitions(self) -> None:
        zero = self.zero
        for index, flat in enumerate(zero.fp32_partitioned_groups_flat):
            low = zero.fp16_partitioned_groups_flat[index]
            low.data.copy_(flat.data)
            views = zero.unflatten(low, zero.fp16_partitioned_groups[index])
            for partition, view in zip(zero.fp16_partitioned_groups[index], views, strict=True):
                partition.data = view.data
        if zero.persistent_parameters:  # small ones, kept whole on every rank
            zero.persistent_parameters[0].partition(zero.persistent_parameters)
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)


def update_weights_in_place(zero: Any) -> None:
    """Let a `DeepSpeedZeroOptimizer` (ZeRO 1 and 2) with bfloat16 masters update the model's own weights.

    It makes a copy of its part of the weights, in which it updates; ZeRO-3 uses the part itself by its own choice.
    """
    for index, flat in enumerate(zero.single_partition_of_fp32_groups):
        rank = dist.get_rank(group=zero.real_dp_process_group[index])
        flat.data = zero.parallel_partitioned_bit16_groups[index][rank].detach()
        for parameter in zero.bit16_groups[index]:
            at = parameter._hp_mapping
            if at is not None:
                place = at.hp_fragment_address
                at.hp_fragment = flat.detach().narrow(0, place.start, place.numel)
