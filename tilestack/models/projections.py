"""Several linear layers of one input as one step of autograd, so that their input's gradient is summed by cuBLAS."""

from __future__ import annotations

import torch
from torch import nn


class _SharedInput(torch.autograd.Function):
    """y_i = x @ weight_i.T. Autograd of its own would write a gradient of x for each and add them up afterwards."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, *weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.save_for_backward(x, *weights)
        return tuple(nn.functional.linear(x, weight) for weight in weights)

    @staticmethod
    def backward(ctx, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        grads = [grad.reshape(-1, grad.shape[-1]) for grad in grads]
        dx = None
        if ctx.needs_input_grad[0]:
            dx = grads[0] @ weights[0]
            for grad, weight in zip(grads[1:], weights[1:], strict=True):
                dx.addmm_(grad, weight)
            dx = dx.view(x.shape)
        rows = x.reshape(-1, x.shape[-1])
        dweights = [
            grad.T @ rows if needed else None for grad, needed in zip(grads, ctx.needs_input_grad[1:], strict=True)
        ]
        return (dx, *dweights)


def project(x: torch.Tensor, *layers: nn.Module) -> tuple[torch.Tensor, ...]:
    """What each of the layers gives for x [..., H]; as one step of autograd where all of them are plain nn.Linear.

    A layer that is wrapped (PEFT), hooked, has a bias or runs under autocast is called as it is.
    """
    if all(map(_is_plain, layers)) and not torch.is_autocast_enabled(x.device.type):
        return _SharedInput.apply(x, *[layer.weight for layer in layers])
    return tuple(layer(x) for layer in layers)


def _is_plain(layer: nn.Module) -> bool:
    return type(layer) is nn.Linear and layer.bias is None and not is_hooked(layer)


def is_hooked(module: nn.Module) -> bool:
    """Whether somebody watches or changes what goes into the module or comes out of it."""
    return any((module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks))
