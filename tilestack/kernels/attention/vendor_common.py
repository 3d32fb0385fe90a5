"""What the adapters to other libraries' attention share: their refusals, and the two layouts.

An adapter translates arguments and nothing more. What its library lacks, it refuses.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tilestack.kernels.attention.features import refuses_features
from tilestack.kernels.dispatch import Call

HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Abilities:
    """What a library's attention has.

    max_head_dim: multiples of 8 up to this one; None is no limit. uneven_causal: a causal mask aligned at the bottom
    right where lengths differ. deterministic: gradients with the same bits each time, for packed input too if
    deterministic_packed. single_rows: one query or one key. features: of those in features.py.
    """

    max_head_dim: int | None
    dtypes: tuple[torch.dtype, ...] = HALF
    packed: bool = False
    window: bool = False
    uneven_causal: bool = False
    grouped: bool = True
    deterministic: bool = False
    deterministic_packed: bool = False
    single_rows: bool = True
    features: tuple[str, ...] = ()

    def refuses(self, call: Call) -> str | None:
        """None, or why the library does not take the call."""
        return (
            self._refuses_tensors(call)
            or self._refuses_mask(call)
            or refuses_features(call, self.features)
            or self._refuses_determinism(call)
        )

    def _refuses_tensors(self, call: Call) -> str | None:
        q, k, dtype = call.shape("q"), call.shape("k"), call.dtype("q")
        if dtype not in self.dtypes:
            return f"is for {', '.join(str(each)[6:] for each in self.dtypes)}, got {str(dtype)[6:]}"
        if q[-1] % 8 or (self.max_head_dim and q[-1] > self.max_head_dim):
            limit = f" up to {self.max_head_dim}" if self.max_head_dim else ""
            return f"takes head dimensions that are multiples of 8{limit}, got {q[-1]}"
        if 0 in (*q, *k):
            return "has no empty input"
        if q[-2] != k[-2] and not self.grouped:
            return f"has no backward for grouped queries, got {q[-2]} heads over {k[-2]}"
        if is_packed(call) and not self.packed:
            return "has no packed input"
        if is_packed(call) and call.shape("cu_seqlens_q")[0] == 1:
            return "needs at least one document"
        if not self.single_rows and not is_packed(call) and 1 in (q[1], k[1]):
            return "has no sequences of length 1"
        return None

    def _refuses_mask(self, call: Call) -> str | None:
        params = call.params
        windowed = params.window_left >= 0 or params.window_right > 0
        if windowed and not self.window:
            return "has no window"
        if params.causal and not self.uneven_causal and call.shape("q")[1] != call.shape("k")[1]:
            return "aligns a causal mask at the top left where the lengths differ"
        return None

    def _refuses_determinism(self, call: Call) -> str | None:
        asked = True if call.params.deterministic else "keys" if call.params.deterministic_keys else None
        if not (asked and call.needs_grad):
            return None
        if not (self.deterministic_packed if is_packed(call) else self.deterministic):
            return f"has no backward that gives the same bits each time, and deterministic={asked!r} was asked for"
        return None


def is_packed(call: Call) -> bool:
    """Whether the call is of packed input."""
    return len(call.shape("q")) == 3


def readable(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy where its last dimension is not contiguous."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def heads_first(tensor: torch.Tensor) -> torch.Tensor:
    """[B, S, H, D] as a view [B, H, S, D], the layout of scaled_dot_product_attention."""
    return readable(tensor).transpose(1, 2)


def heads_last(tensor: torch.Tensor) -> torch.Tensor:
    """[B, H, S, D] as contiguous [B, S, H, D]; a view where the library kept the layout of its input."""
    return tensor.transpose(1, 2).contiguous()


def longest(max_seqlen: int, tokens: int) -> int:
    """A bound on the documents' length: the caller's, or the number of tokens where it gave none."""
    return max(max_seqlen, 1) if max_seqlen >= 0 else tokens


def wanted(needs: tuple[str, ...], dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The gradients asked for, in order."""
    found = {"q": dq, "k": dk, "v": dv}
    return tuple(found[name] for name in needs)


def lse_of_flash_attn(lse: torch.Tensor) -> torch.Tensor:
    """flash-attn 2 says +inf where a query sees no key; the contract says -inf."""
    return lse.masked_fill(lse == torch.inf, -torch.inf)


def lse_for_flash_attn(lse: torch.Tensor) -> torch.Tensor:
    """The other way round."""
    return lse.masked_fill(lse == -torch.inf, torch.inf)
