"""How the hub's checkpoints store what the model has fused: a matrix for each expert, the gate's apart from up's."""

from __future__ import annotations

import re


def matrices_of_experts(name: str) -> tuple[str, tuple[str, ...]] | None:
    """(path of the experts, names of the matrices fused in each) of a parameter; None if it is stored as it is."""
    found = re.fullmatch(r"(.*\.mlp\.experts)\.(gate_up_proj|down_proj)", name)
    if found is None:
        return None
    return found[1], ("gate_proj", "up_proj") if found[2] == "gate_up_proj" else ("down_proj",)


def stored_name(path: str, expert: int, matrix: str) -> str:
    """The name of one expert's matrix in a checkpoint."""
    return f"{path}.{expert}.{matrix}.weight"
