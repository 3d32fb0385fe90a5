"""The one exception of this package."""

from __future__ import annotations


class FlashAttentionError(ValueError, RuntimeError):
    """A wrong argument. flash-attn raises RuntimeError and tilestack ValueError; this one is caught as either."""


def check(holds: bool, name: str, rule: str, value: object) -> None:
    """Raise FlashAttentionError unless `holds`: the argument, the rule, the value."""
    if not holds:
        raise FlashAttentionError(f"flash_attn: {name} must be {rule}, got {value}")
