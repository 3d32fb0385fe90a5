"""The gradients and the update of ZeRO 2, and the update of ZeRO 3, in one pass over what a rank keeps.

DeepSpeed's own steps read a rank's gradients many times before AdamW does (searches for what is not finite, the norm in
float64, a copy in float32, the clipping in place), wait for the device, copy the new weights, and ZeRO 2 gathers them
when all are updated. Here `kernels.adamw` reads the gradient as it is, clips while it updates, writes the model's own
weights, and leaves everything as it is where the norm is not finite. Nothing waits for the device.

Under ZeRO 2 what belongs together (`unit`) is one of DeepSpeed's parameter groups; every rank has an equal part of it:

    backward   the unit's gradients are there -> reduce-scatter -> this rank's part      while the backward pass goes on
    update     this rank's part -> AdamW -> its weights -> all-gather                    while the next unit is updated

A weight of experts is sent from where autograd made it. DeepSpeed would copy gradients into buckets, these once more,
and sum whole buckets on all ranks: twice the bytes, of which a rank throws away what it does not keep.
"""

from __future__ import annotations

import re
from collections import deque
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from tilestack.distributed.deepspeed_settings import IN_FLIGHT
from tilestack.distributed.optimizer import AdamW


class OnePassZeroOptimizer(DeepSpeedZeroOptimizer):
    """DeepSpeed's ZeRO 2 with another reduction and another `step`. Gradients are the ranks' sum, not their mean."""

    def take_over(self) -> None:
        """Begin, after DeepSpeed has made the optimizer."""
        self.gradient_average = False
        self._missing = [len(group) for group in self.bit16_groups]  # gradients that the backward pass has not made yet
        self._travelling: deque[tuple[int, dist.Work, torch.Tensor, torch.Tensor]] = deque()
        self._parts: list[torch.Tensor | None] = [None] * len(self.bit16_groups)  # of gradients: what this rank keeps
        for flat in self.single_partition_of_fp32_groups:  # in this order, which a state's seed comes from
            self.optimizer.start(flat)
        # the largest first: nothing hides the last one's way
        self._order = sorted(range(len(self.bit16_groups)), key=lambda index: -self.partition_size[index])

    def process_gradients(self, param: torch.nn.Parameter, i: int) -> None:
        """DeepSpeed's hook: the gradient of a parameter of group i is there."""
        self._missing[i] -= 1
        if self._missing[i] == 0:
            self._send(i)

    def independent_gradient_partition_epilogue(self) -> None:
        """After a backward pass."""
        for index, missing in enumerate(self._missing):
            if missing:  # parameters that the loss does not depend on
                self._send(index)
            self._missing[index] = len(self.bit16_groups[index])
        self._receive(0)
        self._epilogue_ran_this_backward = True

    def _send(self, index: int) -> None:
        """Begin to reduce and scatter the gradients of a group."""
        parameters = self.round_robin_bit16_groups[index]
        gradients = [torch.zeros_like(each) if each.grad is None else each.grad for each in parameters]
        for each in parameters:
            each.grad = None
        process_group = self.real_dp_process_group[index]
        ranks = dist.get_world_size(process_group)
        self._receive(IN_FLIGHT - 1)
        aligned, padding = self.nccl_start_alignment_factor * ranks, self.round_robin_bit16_padding[index]
        whole = self.flatten_dense_tensors_aligned(gradients, aligned, param_padding=padding)
        if ranks == 1:  # of split experts that no other rank has
            self._keep(index, whole)
            return
        if self.sequence_parallel_size > 1:  # DeepSpeed's rule for ranks that share rows
            whole = whole.float()
        elif self.communication_data_type != whole.dtype:
            whole = whole.to(self.communication_data_type)
        part = whole.new_empty(whole.numel() // ranks)
        work = dist.reduce_scatter_tensor(part, whole, group=process_group, async_op=True)
        self._travelling.append((index, work, part, whole))

    def _receive(self, left: int) -> None:
        """Take in what has arrived; wait (on the device's stream, not on the host) until no more are on their way."""
        while len(self._travelling) > left:
            index, work, part, _ = self._travelling.popleft()
            work.wait()
            self._keep(index, part)

    def _keep(self, index: int, part: torch.Tensor) -> None:
        """Add what a micro-batch gave to this rank's part of the gradients."""
        if self._parts[index] is None:
            self._parts[index] = part.to(self.gradient_accumulation_dtype)
        else:
            self._parts[index].add_(part)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One update. `_global_grad_norm` is on the device; where it is not finite, no weight changes."""
        self.overflow = False  # never known on the host
        self._global_grad_norm = global_norm(self._parts, self.dp_process_group, self.bit16_groups_flat[0].device)
        scale = scale_of_gradients(self._global_grad_norm, self.clip_grad)
        gathering = [self._update(index, scale) for index in self._order]
        for work in gathering:
            if work is not None:
                work.wait()

    def _update(self, index: int, scale: torch.Tensor) -> dist.Work | None:
        """Update this rank's part of a group of parameters, and begin to gather the group's weights."""
        process_group = self.real_dp_process_group[index]
        weights = self.parallel_partitioned_bit16_groups[index][dist.get_rank(process_group)].detach()
        gradient, self._parts[index] = self._parts[index], None
        group, master = self.optimizer.param_groups[index], self.single_partition_of_fp32_groups[index]
        self.optimizer.update(group, master, gradient, weights=weights, grad_scale=scale)
        if dist.get_world_size(process_group) == 1:
            return None
        whole = self.bit16_groups_flat[index].detach()
        return dist.all_gather_into_tensor(whole, weights, group=process_group, async_op=True)


class OnePassZero3Optimizer(DeepSpeedZeroOptimizer_Stage3):
    """DeepSpeed's ZeRO 3 with another `step`."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One update. `_global_grad_norm` is on the device; where it is not finite, no weight changes."""
        self._pre_step()
        self._partition_all_parameters()
        self.overflow = False  # never known on the host
        groups = range(len(self.fp16_groups))
        kept = [gradient for index in groups for gradient in self.averaged_gradients[index]]
        self._global_grad_norm = global_norm(kept, self.dp_process_group, self.fp32_partitioned_groups_flat[0].device)
        scale = scale_of_gradients(self._global_grad_norm, self.clip_grad)
        self.zero_grad(set_to_none=True)
        for index in groups:
            gradient = self.flatten(self.averaged_gradients[index])
            self.averaged_gradients[index] = None
            group = self.optimizer.param_groups[self.sub_group_to_group_id[index]]
            master, weights = self.fp32_partitioned_groups_flat[index], self.fp16_partitioned_groups_flat[index]
            self.optimizer.update(group, master, gradient, weights=weights.detach(), grad_scale=scale)
            self._unflatten_partitioned_parameters(index)
        self._post_step(set())


def global_norm(kept: list[torch.Tensor], group: dist.ProcessGroup, device: torch.device) -> torch.Tensor:
    """The 2-norm of a gradient of which each rank of the group keeps a part; float32, on the device."""
    square = torch.zeros((), dtype=torch.float32, device=device)
    if kept:
        square += torch.stack(torch._foreach_norm(kept, 2, dtype=torch.float32)).square().sum()
    dist.all_reduce(square, group=group)
    return square.sqrt()


def scale_of_gradients(norm: torch.Tensor, limit: float) -> torch.Tensor:
    """What brings the norm down to the limit (0: none). NaN, with which `adamw` changes nothing, for no finite norm."""
    scale = torch.clamp(limit / (norm + 1e-6), max=1.0) if limit else torch.ones_like(norm)
    return torch.where(torch.isfinite(norm), scale, torch.nan)


def update_in_one_pass(optimizer: Any) -> None:
    """Give DeepSpeed's optimizer a step from above, if it is one of these over our AdamW, with its state on the device.

    `deepspeed.initialize` cannot be told to use another class.
    """
    if not isinstance(getattr(optimizer, "optimizer", None), AdamW):
        return
    if type(optimizer) is DeepSpeedZeroOptimizer and optimizer.partition_gradients and not optimizer.cpu_offload:
        optimizer.__class__ = OnePassZeroOptimizer
        optimizer.take_over()
    elif type(optimizer) is DeepSpeedZeroOptimizer_Stage3 and not optimizer.offload_optimizer:
        optimizer.__class__ = OnePassZero3Optimizer


def bucket_elements(model: torch.nn.Module) -> int:
    """What DeepSpeed's own ZeRO 2 should reduce together: the weights of one module, the largest.

    Where the bucket is full, DeepSpeed makes the backward pass wait for the bucket before. A layer's experts come all
    at once: a bucket that overflows twice with them has it wait for what it has just begun to send. A larger one would
    leave more to send after the backward pass.
    """
    return max(sum(each.numel() for each in module.parameters(recurse=False)) for module in model.modules())


def unit(name: str, parameter: torch.nn.Parameter) -> str:
    """Which parameters ZeRO 2 reduces, updates and gathers together: those with the same answer.

    The weights of a layer's experts, and those outside of the layers, each by itself; what else a layer has together.
    """
    layer = re.match(r".*?\.\d+(?=\.)", name)
    return name if layer is None or parameter.dim() > 2 else layer[0]
