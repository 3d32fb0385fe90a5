"""Whether an attention is right, before it is timed: a slice against float64, everything against tilestack-triton.

The slice is one sequence (the longest) and one key head with its query heads, of which SAMPLE rows are compared by the
rule of `tilestack.testing.compare`. A whole tensor may then differ from tilestack-triton's by twice the slice's budget:
each of the two is at most one budget from the truth.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tilestack.bench.attention_cases import AttentionCase
from tilestack.kernels import attention
from tilestack.testing.compare import assert_close

SAMPLE = 256
CHUNK = 1024
NAMES = ("out", "dq", "dk", "dv")

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Truth:
    """exact, eager: sampled rows of the slice on the CPU. whole: tilestack-triton's tensors, None where it failed."""

    exact: Tensors
    eager: Tensors
    whole: Tensors | None

    def check(self, case: AttentionCase, found: Tensors) -> dict[str, float]:
        """Assert that `found` (NAMES, whole tensors) is right; returns each one's relative error on the slice."""
        sample = sampled(case, found)
        errors = {}
        for name in NAMES:
            exact = self.exact[name]
            error, eager_error = assert_close(name, sample[name], self.eager[name], exact)
            size = exact.square().mean().sqrt().item()
            errors[name] = error / size
            if self.whole is not None:
                budget = 2 * (2 * eager_error / size + torch.finfo(found[name].dtype).eps)
                _assert_near(name, found[name], self.whole[name], budget)
        return errors


def _assert_near(name: str, found: torch.Tensor, whole: torch.Tensor, budget: float) -> None:
    difference = (found.float() - whole.float()).norm() / whole.float().norm()
    assert difference <= budget, f"{name}: differs from tilestack-triton by {difference:.3g}, over {budget:.3g}"


def run(call, tensors: dict[str, torch.Tensor | None]) -> Tensors:
    """The output and the gradients of one call, into memory that holds NaN."""
    poison(tensors["q"].device)
    leaves = [tensors[name] for name in ("q", "k", "v")]
    out = call(*leaves)
    return dict(zip(NAMES, (out.detach(), *torch.autograd.grad(out, leaves, tensors["dout"])), strict=True))


def poison(device: torch.device) -> None:
    """Leave a large block of NaN in the allocator, from which the next tensors are cut."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.full((2**30,), torch.nan, device=device)


def truth_of(case: AttentionCase, tensors: dict[str, torch.Tensor | None], portable: str = "tilestack-triton") -> Truth:
    """What every implementation is compared with. portable: whose whole tensors serve."""
    part = _slice(case, tensors)
    exact = _float64(
        *(part[name] for name in ("q", "k", "v", "dout")), case.head_dim**-0.5, case.causal, case.window[0]
    )
    q, k, v = (part[name][None].detach().requires_grad_() for name in ("q", "k", "v"))
    eager = attention(q, k, v, causal=case.causal, window_size=case.window, implementation="reference")
    gradients = torch.autograd.grad(eager, (q, k, v), part["dout"][None])
    rows = _rows(part["q"].shape[0])
    eager = dict(zip(NAMES, (each[0, rows].detach().cpu() for each in (eager, *gradients)), strict=True))
    try:
        whole = run(lambda q, k, v: ours(case, tensors, portable)(q, k, v), tensors)
    except RuntimeError:
        whole = None
    return Truth({name: each[rows].cpu() for name, each in exact.items()}, eager, whole)


def ours(case: AttentionCase, tensors: dict[str, torch.Tensor | None], implementation: str):
    """The op as a function of q, k and v."""
    cu, longest = tensors["cu_seqlens"], max(case.sequences)
    packing = {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": longest, "max_seqlen_k": longest}

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return attention(
            q, k, v, causal=case.causal, window_size=case.window, deterministic=case.deterministic,
            implementation=implementation, **(packing if cu is not None else {}),
        )  # fmt: skip

    return call


def sampled(case: AttentionCase, found: Tensors) -> Tensors:
    """The rows of the slice that are compared, on the CPU."""
    parts = {name: _part(case, tensor) for name, tensor in found.items()}
    return {name: part[_rows(part.shape[0])].detach().cpu() for name, part in parts.items()}


def _rows(length: int) -> slice:
    return slice(0, None, max(1, length // SAMPLE))


def _slice(case: AttentionCase, tensors: dict[str, torch.Tensor | None]) -> Tensors:
    return {name: _part(case, tensors[name].detach()) for name in ("q", "k", "v", "dout")}


def _part(case: AttentionCase, tensor: torch.Tensor) -> torch.Tensor:
    """[S, heads of one group, D]: the last key head of the last sequence, or of the longest document."""
    if case.lengths is None:
        rows = tensor[-1]
    else:
        longest = max(range(len(case.lengths)), key=case.lengths.__getitem__)
        start = sum(case.lengths[:longest])
        rows = tensor[start : start + case.lengths[longest]]
    return rows[:, -(tensor.shape[-2] // case.kv_heads) :]


def _float64(q, k, v, dout, scale: float, causal: bool, left: int) -> Tensors:
    """q, dout [S, G, D]; k, v [S, 1, D]. The definition, CHUNK queries at a time. left: of a causal window."""
    q, dout = (each.double().transpose(0, 1) for each in (q, dout))
    k, v = (each.double()[:, 0] for each in (k, v))
    out, dq, dk, dv = (torch.zeros_like(each) for each in (q, q, k, v))
    length = q.shape[1]
    for start in range(0, length, CHUNK):
        rows = slice(start, min(start + CHUNK, length))
        seen = rows.stop if causal else length
        scores = scale * (q[:, rows] @ k[:seen].T)
        if causal:
            queries, keys = (torch.arange(n, device=q.device) for n in (rows.stop, seen))
            scores.masked_fill_(keys > queries[rows, None], -torch.inf)
            if left >= 0:
                scores.masked_fill_(keys < queries[rows, None] - left, -torch.inf)
        p = scores.softmax(-1)
        out[:, rows] = p @ v[:seen]
        delta = (out[:, rows] * dout[:, rows]).sum(-1, keepdim=True)
        ds = scale * p * (dout[:, rows] @ v[:seen].T - delta)
        dq[:, rows] = ds @ k[:seen]
        dk[:seen] += (ds.mT @ q[:, rows]).sum(0)
        dv[:seen] += (p.mT @ dout[:, rows]).sum(0)
    found = (out.transpose(0, 1), dq.transpose(0, 1), dk[:, None], dv[:, None])
    return dict(zip(NAMES, found, strict=True))
