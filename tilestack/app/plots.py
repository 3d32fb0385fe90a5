"""The picture of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display is needed
from matplotlib import pyplot


def plot_loss(records: list[dict[str, Any]], path: Path) -> None:
    """Write loss.png: the loss of every step, on held-out text where it was measured, and the learning rate."""
    figure, (loss, rate) = pyplot.subplots(
        2, 1, figsize=(8, 6), sharex=True, height_ratios=(3, 1), layout="constrained"
    )
    loss.plot([r["step"] for r in records], [r["loss"] for r in records], linewidth=1, label="training")
    held_out = [r for r in records if "eval_loss" in r]
    if held_out:
        loss.plot([r["step"] for r in held_out], [r["eval_loss"] for r in held_out], "o-", label="held-out text")
    loss.set_ylabel("loss (nats per token)")
    loss.legend()
    loss.grid(alpha=0.3)
    rate.plot([r["step"] for r in records], [r["lr"] for r in records], linewidth=1, color="tab:green")
    rate.set_ylabel("learning rate")
    rate.set_xlabel("step")
    rate.grid(alpha=0.3)
    temporary = path.with_name(f".tmp-{path.name}")
    figure.savefig(temporary, dpi=120)
    temporary.replace(path)
    pyplot.close(figure)
