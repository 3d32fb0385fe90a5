"""Whether an MoE block is right, before it is timed: a sample of tokens and of experts against float64.

The rule is that of `tilestack.testing.compare`. Routing is discrete: where the K-th and the next logit are equal in
bf16, implementations may choose either expert. Such tokens are not compared, and their upstream gradient is 0 in the
check, so that they add nothing to the gradients of weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812

from tilestack.bench.attention_check import poison
from tilestack.kernels import moe, router
from tilestack.testing.compare import assert_close

SAMPLE = 512
NAMES = ("out", "dx", "dgate_up", "ddown")

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Truth:
    """tokens: the sampled ones [N]; experts: the sampled ones; dout [T, H], 0 where routing is a tie.

    exact, eager: by NAMES, out and dx [N, H] of the tokens, dgate_up and ddown of the experts.
    """

    tokens: torch.Tensor
    experts: list[int]
    dout: torch.Tensor
    exact: Tensors
    eager: Tensors

    def check(self, problem, call: Callable[[], torch.Tensor]) -> dict[str, float]:
        """Assert that the block `call` is right; returns the relative error of each of NAMES."""
        poison(problem.x.device)
        out = call()
        dx, dgate_up, ddown = torch.autograd.grad(out, (problem.x, problem.gate_up, problem.down), self.dout)
        found = {"out": out.detach()[self.tokens], "dx": dx[self.tokens]}
        found |= {"dgate_up": dgate_up[self.experts], "ddown": ddown[self.experts]}
        errors = {}
        for name in NAMES:
            error, _ = assert_close(name, found[name], self.eager[name], self.exact[name])
            errors[name] = error / self.exact[name].square().mean().sqrt().item()
        return errors


def truth_of(problem) -> Truth:
    """What every implementation is compared with."""
    with torch.no_grad():
        logits = F.linear(problem.x, problem.gate)
        top = logits.topk(problem.top_k + 1, -1).values
        tied = top[:, -1] == top[:, -2]
        ids = router(logits, top_k=problem.top_k, implementation="reference").topk_ids
    dout = problem.dout.masked_fill(tied[:, None], 0)
    untied = (~tied).nonzero()[:, 0]
    tokens = untied[:: max(1, len(untied) // SAMPLE)]
    busiest = ids.flatten().bincount(minlength=len(problem.down)).argmax().item()
    experts = sorted({busiest, len(problem.down) // 2})
    exact, eager = (_sampled(problem, logits, ids, dout, tokens, experts, wide) for wide in (True, False))
    return Truth(tokens, experts, dout, exact, eager)


def _sampled(problem, logits, ids, dout, tokens, experts, wide: bool) -> Tensors:
    """NAMES by the reference, in float64 if `wide`; it sees the logits as they were rounded."""

    def of(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().double() if wide else tensor.detach()

    x = of(problem.x[tokens]).requires_grad_()
    own = F.linear(x, of(problem.gate))
    seen = own + (of(logits[tokens]) - own).detach()
    weights = router(seen, top_k=problem.top_k, implementation="reference").topk_weights
    # the ids of the block, which the reference might order otherwise: sorted by logit, ties are not in the sample
    out = moe(x, of(problem.gate_up), of(problem.down), ids[tokens], weights, implementation="reference")
    (dx,) = torch.autograd.grad(out, x, of(dout[tokens]))
    gradients = [_of_expert(problem, logits, ids, dout, expert, of) for expert in experts]
    found = (out.detach(), dx, *(torch.stack(each) for each in zip(*gradients, strict=True)))
    return dict(zip(NAMES, found, strict=True))


def _of_expert(problem, logits, ids, dout, expert: int, of: Callable) -> tuple[torch.Tensor, torch.Tensor]:
    """dgate_up and ddown of one expert: all others are another rank's."""
    rows = (ids == expert).any(-1).nonzero()[:, 0]
    gate_up, down = (of(each[expert : expert + 1]).requires_grad_() for each in (problem.gate_up, problem.down))
    weights = router(of(logits[rows]), top_k=problem.top_k, implementation="reference").topk_weights
    local = torch.where(ids[rows] == expert, 0, -1).to(ids.dtype)
    out = moe(of(problem.x[rows]), gate_up, down, local, weights, implementation="reference")
    dgate_up, ddown = torch.autograd.grad(out, (gate_up, down), of(dout[rows]))
    return dgate_up[0], ddown[0]
