"""The update of ZeRO 2 and 3 in one pass over what a rank keeps; under ZeRO 2 it hides the gathering of the weights.

DeepSpeed's own steps read a rank's gradients many times before AdamW does (searches for what is not finite, the norm in
float64, a copy in float32, the clipping in place), wait for the device, copy the new weights, and ZeRO 2 gathers them
when all are updated. Here `kernels.adamw` reads the gradient as it is, clips while it updates, writes the model's own
weights, and leaves everything as it is where the norm is not finite. ZeRO 2 gathers each group while the next one is
updated. Nothing waits for the device.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import INITIAL_MICRO_STEP_ID, DeepSpeedZeroOptimizer

from tilestack.distributed.optimizer import AdamW


class OnePassZeroOptimizer(DeepSpeedZeroOptimizer):
    """DeepSpeed's ZeRO 2 with another `step`. Gradients are the sum over the ranks, not their mean."""

    def independent_gradient_partition_epilogue(self) -> None:
        """After a backward pass. DeepSpeed waits for the device here, on the host; streams can wait for each other."""
        overlaps = self.overlap_comm
        if overlaps and self.bit16_groups_flat[0].is_cuda:
            self.reduce_ipg_grads()
            torch.cuda.current_stream().wait_stream(self.reduction_stream)
            self._clear_previous_reduced_grads()
            self.overlap_comm = False  # there is nothing left to reduce, and nothing to wait for
        super().independent_gradient_partition_epilogue()
        self.overlap_comm = overlaps

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One update. `_global_grad_norm` is on the device; where it is not finite, no weight changes."""
        self.micro_step_id = INITIAL_MICRO_STEP_ID
        self.overflow = False  # never known on the host
        kept = [gradient for index in range(len(self.bit16_groups)) for gradient in self.averaged_gradients[index]]
        kept = [gradient for gradient in kept if not getattr(gradient, "_zero_padding", False)]
        self._global_grad_norm = global_norm(kept, self.dp_process_group, self.bit16_groups_flat[0].device)
        scale = scale_of_gradients(self._global_grad_norm, self.clip_grad)
        gathering = [self._update(index, scale) for index in range(len(self.bit16_groups))]
        for work in gathering:
            work.wait()  # on the device's stream, not on the host

    def _update(self, index: int, scale: torch.Tensor) -> dist.Work:
        """Update this rank's part of a group of parameters, and begin to gather the group's weights."""
        process_group = self.real_dp_process_group[index]
        rank, ranks = dist.get_rank(process_group), dist.get_world_size(process_group)
        weights = self.parallel_partitioned_bit16_groups[index][rank]
        master = self.single_partition_of_fp32_groups[index]
        gradient = self._get_preflattened_grad_partition(index)
        if gradient is None and rank == ranks - 1:  # the last part is filled up
            gradient = self.flatten_dense_tensors_aligned(self.averaged_gradients[index], self.partition_size[index])
        elif gradient is None:
            gradient = self.flatten(self.averaged_gradients[index])
        self.optimizer.update(
            self.optimizer.param_groups[index], master, gradient, weights=weights.detach(), grad_scale=scale
        )
        for parameters in (self.params_not_in_partition[index], self.params_in_partition[index]):
            self.free_grad_in_param_list(parameters)
        self._release_preflattened_grad_buffers(index)
        self.averaged_gradients[index] = self.all_grad_tensors[index] = None
        return dist.all_gather_into_tensor(
            self.bit16_groups_flat[index].detach(), weights.detach(), group=process_group, async_op=True
        )


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
    if type(optimizer) is DeepSpeedZeroOptimizer and not optimizer.cpu_offload:
        optimizer.__class__ = OnePassZeroOptimizer
        optimizer.gradient_average = False
    elif type(optimizer) is DeepSpeedZeroOptimizer_Stage3 and not optimizer.offload_optimizer:
        optimizer.__class__ = OnePassZero3Optimizer


def bucket_elements(model: torch.nn.Module) -> int:
    """What ZeRO 2 should reduce together: the weights of one module, the largest.

    Where the bucket is full, DeepSpeed makes the backward pass wait for the bucket before. A layer's experts come all
    at once: a bucket that overflows twice with them has it wait for what it has just begun to send. A larger one would
    leave more to send after the backward pass.
    """
    return max(sum(each.numel() for each in module.parameters(recurse=False)) for module in model.modules())
