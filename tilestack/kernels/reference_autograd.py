"""The backward of a reference implementation: torch's own autograd over its forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def gradients(
    compute: Callable[..., tuple[torch.Tensor, ...]],
    inputs: dict[str, torch.Tensor | None],
    grads: tuple[torch.Tensor | None, ...],
    needs: tuple[str, ...],
    params: Any,
) -> tuple[torch.Tensor, ...]:
    """Run `compute(*inputs, params)` again and differentiate it.

    grads: one for each output, None where nothing flows back. Returns the gradients of the inputs in `needs`,
    in the order of `inputs`.
    """
    with torch.enable_grad():
        leaves = {
            name: None if tensor is None else tensor.detach().requires_grad_(name in needs)
            for name, tensor in inputs.items()
        }
        outputs = compute(*leaves.values(), params)
        wanted = [leaves[name] for name in inputs if name in needs]
        # an output may depend on none of the wanted inputs, although something flows back to it
        flowing = [
            (out, grad) for out, grad in zip(outputs, grads, strict=True) if grad is not None and out.requires_grad
        ]
        if not flowing:
            return tuple(torch.zeros_like(each, memory_format=torch.contiguous_format) for each in wanted)
        found = torch.autograd.grad(
            [out for out, _ in flowing],
            wanted,
            [grad for _, grad in flowing],
            allow_unused=True,
            materialize_grads=True,
        )
    return tuple(grad.contiguous() for grad in found)
