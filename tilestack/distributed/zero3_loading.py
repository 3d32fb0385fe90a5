"""ZeRO-3: an outline of a model is cut up among the ranks, and each reads its own part.

`deepspeed.zero.Init` makes every parameter whole on every rank and sends rank 0's values around; transformers, loading
a checkpoint under it, first reads all of it into the memory of every rank. Here a parameter has its full size for a
moment, as memory that nobody has written to; the rank's part of it is read from the source; and DeepSpeed keeps that.
"""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.partition_parameters import Init
from torch import nn

from tilestack.models import Weights, restore_rotary_frequencies
from tilestack.models.weights import replace_data


@torch.no_grad()
def materialise_parts(model: nn.Module, weights: Weights, settings: dict[str, Any], device: torch.device) -> None:
    """Give every parameter of an outline to DeepSpeed, of which this rank has its part.

    settings: the DeepSpeed configuration, which says where the parts lie.
    """
    # the batch is of no concern here, and Init does not know of ranks that share rows
    init = deepspeed.zero.Init(config_dict_or_path={k: v for k, v in settings.items() if k != "train_batch_size"})
    for name, parameter in list(model.named_parameters()):
        whole = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
        start, end = _own_part(init, whole.numel())
        weights.fill(name, start, whole.view(-1)[start:end])
        new = replace_data(model, parameter, whole)
        del whole
        init._convert_to_deepspeed_param(new)
        new.partition()
    restore_rotary_frequencies(model, device)


def _own_part(init: Init, numel: int) -> tuple[int, int]:
    """Elements [start, end) of a parameter, which this rank keeps."""
    if init.zero_param_process_group is not None:  # hpZeRO: a second part, of another cut
        return 0, numel
    ranks = dist.get_world_size(init.ds_process_group)
    part = -(-numel // ranks)
    rank = dist.get_rank(init.ds_process_group)
    return min(rank * part, numel), min((rank + 1) * part, numel)
