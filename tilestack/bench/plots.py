"""Pictures of result files, for the documentation. Each carries the run that it shows in its metadata."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display is needed
from matplotlib import pyplot

from tilestack.bench.kernel_tables import DIRECTIONS, attention_family, ordered
from tilestack.bench.numerics import FACTOR, FLOAT32, OURS, WINDOW, judge, losses_of

SOURCE = "Description"  # a PNG keyword: which run the picture shows


def source(run: dict) -> str:
    """What a picture's metadata says of its run."""
    return f"{run['bench']}, {run['device']}, {run['date']}"


def plot_attention(run: dict, path: Path) -> None:
    """TFLOP/s over the sequence length for the first kind of shape, forward and backward, every implementation."""
    speed = [row for row in run["rows"] if row["ms_median"] is not None and not row["case"]["lengths"]]
    family = attention_family(speed[0])
    rows = [row for row in speed if attention_family(row) == family]
    figure, panels = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for panel, direction in zip(panels, DIRECTIONS, strict=True):
        for name in ordered(row["implementation"] for row in rows):
            line = sorted(
                (row["case"]["seqlen"], row["tflops"])
                for row in rows
                if row["implementation"] == name and row["direction"] == direction
            )
            style = {"linewidth": 2.5} if name == "tilestack" else {"linewidth": 1.2, "alpha": 0.8}
            panel.plot(*zip(*line, strict=True), "o-", markersize=4, label=name, **style)
        panel.axhline(run["ceilings"]["matmul_tflops"], color="gray", linestyle=":", label="bf16 product, 8192 cubed")
        lengths = sorted({row["case"]["seqlen"] for row in rows})
        panel.set_xscale("log", base=2)
        panel.set_xticks(lengths, [str(length) for length in lengths])
        panel.set_xlabel("sequence length (tokens; 16384 in all)")
        panel.set_title(direction)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("TFLOP/s")
    panels[0].set_ylim(bottom=0)
    panels[1].legend(fontsize="small")
    figure.suptitle(f"{run['device']}, bf16, {family}")
    _save(figure, run, path)


def plot_moe(run: dict, path: Path) -> None:
    """TFLOP/s of forward and backward over the tokens, every implementation and routing."""
    rows = [row for row in run["rows"] if row["ms_median"] is not None and row["direction"] == "both"]
    figure, panel = pyplot.subplots(figsize=(7, 4), layout="constrained")
    names = ordered(row["implementation"] for row in rows)
    colours = dict(zip(names, pyplot.rcParams["axes.prop_cycle"].by_key()["color"], strict=False))
    for name in names:
        for routing, style in (("random", "o-"), ("skewed", "s--")):
            line = sorted(
                (row["case"]["tokens"], row["tflops"])
                for row in rows
                if row["implementation"] == name and row["case"]["routing"] == routing
            )
            if line:
                label = f"{name}, {routing}"
                panel.plot(*zip(*line, strict=True), style, color=colours[name], markersize=4, label=label)
    tokens = sorted({row["case"]["tokens"] for row in rows})
    panel.set_xscale("log", base=2)
    panel.set_xticks(tokens, [str(each) for each in tokens])
    panel.set_xlabel("tokens")
    panel.set_ylabel("TFLOP/s, forward and backward")
    panel.set_ylim(bottom=0)
    panel.grid(alpha=0.3)
    panel.legend(fontsize="small")
    figure.suptitle(f"{run['device']}, bf16, MoE block of Qwen3-30B-A3B")
    _save(figure, run, path)


def plot_numerics(run: dict, path: Path) -> None:
    """Losses of every order, and how far each bf16 run is from float32, over the envelope of transformers' runs."""
    runs = losses_of(run["rows"])
    verdict = judge(runs)
    orders = sorted({order for order, _ in runs})
    figure, panels = pyplot.subplots(
        2, len(orders), figsize=(4.2 * len(orders), 6), sharex=True, sharey="row", squeeze=False, layout="constrained",
        height_ratios=(2, 3),
    )  # fmt: skip
    colours = {FLOAT32: "black", OURS: "tab:green", "transformers eager": "tab:orange", "transformers sdpa": "tab:blue"}
    for (above, below), order in zip(panels.T, orders, strict=True):
        for (of, name), losses in runs.items():
            if of == order:
                width = 1.6 if name == OURS else 0.9
                above.plot(range(1, len(losses) + 1), losses, color=colours[name], linewidth=width, label=name)
        steps = range(len(runs[order, FLOAT32]) - len(verdict.envelope) + 1, len(runs[order, FLOAT32]) + 1)
        for factor, shade in ((FACTOR, 0.08), (1, 0.14)):
            edge = [factor * value for value in verdict.envelope]
            label = "envelope of transformers' bf16 runs" if factor == 1 else f"{factor} times it"
            below.fill_between(steps, edge, [-value for value in edge], color="gray", alpha=shade, label=label)
        for (of, name), values in verdict.deviations.items():
            if of == order:
                below.plot(steps, values, color=colours[name], linewidth=2 if name == OURS else 1, label=name)
        below.axhline(0, color="black", linewidth=0.8)
        above.set_title(f"order {order}")
        below.set_xlabel("step")
        above.grid(alpha=0.3)
        below.grid(alpha=0.3)
    panels[0][0].set_ylabel("loss")
    panels[1][0].set_ylabel(f"loss minus float32's,\nmean of {WINDOW} steps")
    panels[0][-1].legend(fontsize="small")
    panels[1][0].legend(fontsize="small", loc="upper left")
    figure.suptitle(f"{run['device']}, {len(runs[orders[0], FLOAT32])} steps from the same start on the same text")
    _save(figure, run, path)


def plot_step(run: dict, path: Path) -> None:
    """Milliseconds and peak memory of a training step, every implementation that fits, a group for each case."""
    rows = [row for row in run["rows"] if row["op"] == "step" and row["ms_median"] is not None]
    names = ordered(row["implementation"] for row in rows)
    cases = list(dict.fromkeys((row["case"]["batch"], row["case"]["seqlen"]) for row in rows))
    figure, panels = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for panel, key, what in zip(panels, ("ms_median", "peak_gib"), ("milliseconds", "peak GiB"), strict=True):
        for index, name in enumerate(names):
            own = {
                (row["case"]["batch"], row["case"]["seqlen"]): row[key] for row in rows if row["implementation"] == name
            }
            places = [cases.index(case) + index / (len(names) + 1) for case in own]
            bars = panel.bar(places, own.values(), 1 / (len(names) + 1), label=name)
            panel.bar_label(bars, fmt="%.0f", fontsize="small")
        middle = (len(names) - 1) / (len(names) + 1) / 2
        panel.set_xticks([place + middle for place in range(len(cases))], [f"{b} x {s}" for b, s in cases])
        panel.set_xlabel("sequences x tokens")
        panel.set_ylabel(what)
    panels[0].legend(fontsize="small")
    figure.suptitle(f"{run['device']}, bf16, forward and backward of {rows[0]['case']['layers']} layers and the loss")
    _save(figure, run, path)


def _save(figure: pyplot.Figure, run: dict, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, metadata={SOURCE: source(run)})
    pyplot.close(figure)


PLOTS = {"attention": plot_attention, "moe": plot_moe, "numerics": plot_numerics, "step": plot_step}
