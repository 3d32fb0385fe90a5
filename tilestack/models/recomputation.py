"""What a layer keeps for its backward: everything, its input and attention's output, or its input alone."""

from __future__ import annotations

import functools
from typing import Literal, get_args

import torch
from torch import nn
from torch.utils.checkpoint import create_selective_checkpoint_contexts
from transformers import PreTrainedModel
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeModel

from tilestack.kernels import ops

Recomputation = Literal["none", "selective", "full"]

_SDPA = ("flash_attention", "flash_attention_for_cpu", "efficient_attention", "cudnn_attention")


def recompute_activations(model: PreTrainedModel, mode: Recomputation, *, offload: bool = False) -> None:
    """Choose what the decoder layers keep between forward and backward.

    mode: "none": all that backward reads. "full": a layer's input [T, H], and all else is computed again. "selective":
        beside it the output of attention with its log-sum-exp: of what is recomputed, attention alone grows with the
        square of the length, and the rest of a layer is cheap.
    offload: the inputs of the layers lie in page-locked memory of the host meanwhile; needs a mode that recomputes.

    Gradients are those without recomputation, but for the last addition of a layer, which is not left to the next norm.
    Raises ValueError for another mode, or for offload without recomputation.
    """
    if mode not in get_args(Recomputation):
        raise ValueError(f"mode must be one of {', '.join(map(repr, get_args(Recomputation)))}, got {mode!r}")
    if offload and mode == "none":
        raise ValueError(
            "offload keeps the inputs of recomputed layers on the host, and with mode='none' no layer is recomputed; "
            "take 'selective' or 'full'"
        )
    for module in model.modules():
        if isinstance(module, Qwen3MoeModel):
            module.offloads_inputs = offload
    # transformers 5.23 renamed it, and warns of the old name
    renamed = hasattr(model, "activation_checkpointing_enable")
    prefix = "activation" if renamed else "gradient"
    if mode == "none":
        getattr(model, f"{prefix}_checkpointing_disable")()
        return
    # reentrant checkpointing has no such choice, and takes the inputs' gradients only by position
    arguments = {"use_reentrant": False}
    if mode == "selective":
        arguments["context_fn"] = functools.partial(create_selective_checkpoint_contexts, attention_operators())
    getattr(model, f"{prefix}_checkpointing_enable")(**{f"{prefix}_checkpointing_kwargs": arguments})


def attention_operators() -> list[torch._ops.OpOverload]:
    """Every operator whose results selective recomputation keeps: our attention's, and those behind torch's SDPA."""
    ours = [f"attention_forward_{each.suffix}" for each in ops()["attention"].implementations]
    found = [getattr(torch.ops.tilestack, name).default for name in ours if hasattr(torch.ops.tilestack, name)]
    return found + [getattr(torch.ops.aten, f"_scaled_dot_product_{name}").default for name in _SDPA]


def inputs_on_host(model: nn.Module) -> bool:
    """Whether `recompute_activations` was told to keep the layers' inputs on the host."""
    return getattr(model, "offloads_inputs", False)
