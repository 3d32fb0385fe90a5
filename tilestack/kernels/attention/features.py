"""What softcap, sinks, ALiBi slopes and dropout have in common to all implementations of attention."""

from __future__ import annotations

import torch

from tilestack.kernels.attention.layout import empty_lse
from tilestack.kernels.dispatch import Call

SOFTCAP, SINKS, ALIBI, DROPOUT = "softcap", "sinks", "alibi_slopes", "dropout"


def features(call: Call) -> list[str]:
    """Which of the four a call has."""
    found = {
        SOFTCAP: call.params.softcap > 0,
        SINKS: call.tensors.get("sinks") is not None,
        ALIBI: call.tensors.get("alibi_slopes") is not None,
        DROPOUT: call.params.dropout_p > 0,
    }
    return [name for name, asked in found.items() if asked]


def refuses_features(call: Call, taken: tuple[str, ...] = ()) -> str | None:
    """None, or the reason why an implementation with no features but `taken` refuses the call."""
    missing = [name for name in features(call) if name not in taken]
    return f"has no {' and no '.join(missing)}" if missing else None


def lse_of_no_keys(q: torch.Tensor, sinks: torch.Tensor | None) -> torch.Tensor:
    """lse, filled with what a query that sees no key has: its head's sink, or -inf."""
    lse = empty_lse(q)
    return lse.fill_(-torch.inf) if sinks is None else lse.copy_(sinks[:, None].expand(lse.shape))


def sink_gradient(sinks: torch.Tensor, lse: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """Gradient of sinks [Hq]: a sink is one more key, whose value is 0, so its dS is P (0 - delta).

    lse, delta: [B, Hq, Sq] or [Hq, Tq]; delta = rowsum(out * dout) is 0 where a query sees no key. The sum has a fixed
    order: the same input gives the same bits.
    """
    logits = sinks.to(lse.dtype)[:, None]
    probability = torch.where(logits == -torch.inf, 0, torch.exp(logits - lse))  # -inf - -inf is no number
    return probability.mul_(delta).transpose(0, -2).flatten(1).sum(1).neg_().to(sinks.dtype)
