"""The picture on the terminal."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console, Group
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from tilestack.app.trace import words
from tilestack.app.trace.attribution import APPLICATION, DISTRIBUTED, KERNELS, LIBRARIES, MODEL, OTHER

COLOURS = {
    APPLICATION: "cyan", DISTRIBUTED: "blue", MODEL: "yellow", KERNELS: "green", LIBRARIES: "magenta", OTHER: "red",
}  # fmt: skip
MOST_KERNELS = 3
LEAST_GAP_MS = 0.05
WIDE = 110  # columns of a terminal from which on everything is shown
BAR = 12


class Progress:
    """Says what is being done: one line that changes on a terminal, lines in a log."""

    def __init__(self, quiet: bool):
        self._console = Console(stderr=True, quiet=quiet, highlight=False)
        self._status = self._console.status("starting") if self._console.is_terminal else None

    def __enter__(self) -> Progress:
        if self._status is not None:
            self._status.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._status is not None:
            self._status.stop()

    def say(self, text: str) -> None:
        """Replace the line."""
        if self._status is not None:
            self._status.update(escape(text))
        else:
            self._console.print(text, markup=False)


def show(found: dict[str, Any], console: Console | None = None) -> None:
    """Print the pictures of all runs, and what they are beside each other."""
    console = console or Console(highlight=False)
    device, limits = found["device"], found["ceilings"]
    console.print(
        f"\n{escape(device['name'])}; in this run a matrix product of {limits['dtype']} reached "
        f"[bold]{words.flops(limits['matmul_tflops'])}[/], a copy [bold]{words.traffic(limits['copy_gbps'])}[/]."
    )
    console.print(words.kernels_are(device["type"]), style="dim")
    for run in found["runs"]:
        console.print()
        if "error" in run:
            console.print(Panel(escape(run["error"]), title=run["name"], border_style="red", box=box.ROUNDED))
            continue
        console.print(_head(run, console.width))
        console.print(_strip(run, console.width, device["type"]))
        for layer in run["layers"]:
            console.print(_layer(layer, device["type"], console.width))
        console.print(_foot(run))
    if len(found["runs"]) == 2 and not any("error" in run for run in found["runs"]):
        console.print()
        console.print(_comparison(found["runs"], console.width))
    console.print()


def _head(run: dict[str, Any], width: int) -> Table:
    table = Table(box=None, padding=(0, 2), title=f"[bold]{escape(run['name'])}[/]", expand=True, show_header=False)
    figures = words.headline(run)
    across = len(figures) if width >= WIDE else len(figures) // 2
    for start in range(0, len(figures), across):
        table.add_row(
            *(
                f"[dim]{name}[/]\n[bold]{figure}[/]\n[dim]{remark}[/]"
                for name, figure, remark in figures[start:][:across]
            )
        )
    return table


def _strip(run: dict[str, Any], width: int, device: str) -> Text:
    """All layers in one bar, and its legend."""
    text = Text()
    share, drawn = 0.0, 0
    for layer in run["layers"]:  # ends are rounded, not lengths, so that the bar is as long as the terminal is wide
        share += layer["share"]
        end = min(round(share * width), width)
        text.append("█" * (end - drawn), style=COLOURS[layer["layer"]])
        drawn = end
    text.append("\n")
    for layer in run["layers"]:
        if layer["share"] > 0:
            text.append("■ ", style=COLOURS[layer["layer"]])
            text.append(f"{words.title_of(layer['layer'], device)} {words.percent(layer['share'])}   ", style="dim")
    return text


def _layer(layer: dict[str, Any], device: str, width: int) -> Panel:
    colour = COLOURS[layer["layer"]]
    title = (
        f"[bold {colour}]{words.title_of(layer['layer'], device)}[/]  [dim]{escape(words.folder_of(layer['layer']))}[/]"
    )
    subtitle = f"{words.milliseconds(layer['ms']) or 0} ms, {words.percent(layer['share']) or '0%'}"
    body: Any = Text("nothing ran here", style="dim")
    if layer["entries"]:
        body = _entries(layer["entries"], colour, width)
    return Panel(
        body, title=title, subtitle=subtitle, title_align="left", subtitle_align="right", border_style=colour,
        box=box.ROUNDED,
    )  # fmt: skip


def _entries(entries: list[dict[str, Any]], colour: str, width: int) -> Table:
    table = Table(box=None, padding=(0, 1), expand=True, header_style="dim")
    table.add_column("", ratio=1, no_wrap=True, overflow="ellipsis", min_width=24)
    columns = _columns(width)
    for name in columns:
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    large = [entry for entry in entries if entry["share"] >= words.SMALL]
    for entry in large:
        who = f"  [{colour}]{escape(entry['implementation'])}[/]" if entry["implementation"] else ""
        again = entry["recompute_ms"]
        cells = {
            "forward": words.milliseconds(entry["forward_ms"]),
            "backward": words.milliseconds(entry["backward_ms"] + again) + ("*" if again else ""),
            "ms": f"[bold]{words.milliseconds(entry['ms'])}[/]",
            "share": words.percent(entry["share"]),
            "": f"[{colour}]{'━' * max(1, round(entry['share'] * BAR)):{BAR}}[/]",
            "rate": words.rate(entry),
            "of ceiling": "" if entry["of_ceiling"] is None else f"{entry['of_ceiling']:.0%}",
        }
        table.add_row(f"[bold]{escape(entry['what'])}[/]{who}", *(cells[name] for name in columns))
        shown = [kernel for kernel in entry["kernels"][:MOST_KERNELS] if kernel["share"] >= words.SMALL]
        for kernel in shown or entry["kernels"][:1]:
            cells = {"ms": words.milliseconds(kernel["ms"]), "share": words.percent(kernel["share"])}
            name = f"  {kernel['owner']}: {escape(words.kernel_name(kernel['name']))}"
            table.add_row(name, *(cells.get(column, "") for column in columns), style="dim")
    rest = entries[len(large) :]
    if rest:
        cells = {
            "ms": words.milliseconds(sum(each["ms"] for each in rest)),
            "share": words.percent(sum(e["share"] for e in rest)),
        }
        names = ", ".join(escape(each["what"]) for each in rest)
        small = f"{len(rest)} below {words.SMALL:.1%} each: {names}"
        table.add_row(small, *(cells.get(column, "") for column in columns), style="dim")
    return table


def _columns(width: int) -> list[str]:
    """The columns that a terminal of this width has room for."""
    directions = ["forward", "backward"] if width >= WIDE else []
    return [*directions, "ms", "share", *([""] if width >= WIDE else []), "rate", "of ceiling"]


def _foot(run: dict[str, Any]) -> Group:
    owners = "   ".join(
        f"{each['owner']} [bold]{words.milliseconds(each['ms']) or 0}[/] ms ({words.percent(each['share'])})"
        for each in run["owners"]
    )
    lines = [f"kernels by who wrote them:  {owners}"]
    if any(entry["recompute_ms"] for layer in run["layers"] for entry in layer["entries"]):
        lines.append("[dim]* with what the backward pass computes again (activation checkpointing)[/]")
    for gap in run["gaps"][:2]:
        if gap["ms"] >= LEAST_GAP_MS:
            before, host = (escape(words.kernel_name(gap[which], 50)) for which in ("before", "host"))
            gone = words.milliseconds(gap["ms"])
            lines.append(f"[dim]a gap of {gone} ms before {before}; the host was in {host}[/]")
    return Group(*(Text.from_markup(line) for line in lines))


def _comparison(runs: list[dict[str, Any]], width: int) -> Panel:
    ours, theirs = runs
    table = Table(box=None, padding=(0, 1), expand=True, header_style="dim")
    table.add_column("part of a step", ratio=1, min_width=24, overflow="fold")
    for name in (f"{ours['name']} ms", f"{theirs['name']} ms", "times faster"):
        table.add_column(name, justify="right")
    if width >= WIDE:
        table.add_column("", width=24)
    for row in words.compared(runs):
        ratio = row["ratio"]
        shown = "" if ratio is None else f"{ratio:.2f}"
        bar = "" if ratio is None else "━" * max(1, min(24, round(ratio * 4)))
        colour = "green" if ratio is None or ratio >= 1 else "red"
        cells = [
            escape(row["part"]),
            words.milliseconds(row["ours"]),
            words.milliseconds(row["theirs"]),
            f"[{colour}]{shown}[/]",
        ]
        table.add_row(*cells, *([f"[{colour}]{bar}[/]"] if width >= WIDE else []))
    return Panel(table, title=f"{ours['name']} beside {theirs['name']}", title_align="left", box=box.ROUNDED)
