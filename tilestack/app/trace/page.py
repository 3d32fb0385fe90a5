"""The picture as one HTML page that needs nothing from elsewhere: styles, script and data are inside it."""

from __future__ import annotations

import json
from html import escape
from importlib.resources import files
from typing import Any

from tilestack.app.html import card, document
from tilestack.app.trace.attribution import LAYERS, OTHER
from tilestack.app.trace.words import (
    compared,
    flops,
    folder_of,
    headline,
    kernel_name,
    kernels_are,
    milliseconds,
    percent,
    rate,
    title_of,
    traffic,
)  # fmt: skip

CLASSES = dict(zip(LAYERS, ("application", "distributed", "model", "kernels", "libraries", "other"), strict=True))
MOST_KERNELS = 12


def page(found: dict[str, Any]) -> str:
    """The whole page. found: what trace.json holds, with each run's timeline."""
    runs = [run for run in found["runs"] if "error" not in run]
    device = found["device"]
    longest = max((run["timeline"]["view"][1] - run["timeline"]["view"][0] for run in runs), default=0)
    parts = [
        _head(found),
        _comparison(runs) if len(runs) == 2 else "",
        f'<div class="runs{" two" if len(found["runs"]) == 2 else ""}">',
        *(_run(run, found) for run in found["runs"]),
        "</div><h2>One step over time</h2>",
        '<p class="soft small">One of the traced steps; the host may be at work on the next one meanwhile. Drag to '
        "move; Ctrl and the wheel, a double click or the buttons zoom; with the keyboard: arrows, + and -, s for the "
        "step, 0 for all, comma and full stop for the kernel before and after.</p>",
        "<noscript><p>The timeline is drawn by the script in this page; all else is readable without.</p></noscript>",
        *(_timeline(run, number, device["type"], longest) for number, run in enumerate(runs)),
        _how(found),
    ]
    script = files("tilestack.app.trace").joinpath("timeline.js").read_text(encoding="utf-8")
    return document(f"tilestack trace, {device['name']}", "\n".join(parts), script)


def _head(found: dict[str, Any]) -> str:
    limits = found["ceilings"]
    return (
        f"<h1>What a training step runs</h1><p class='soft'>{escape(found['device']['name'])}, "
        f"{escape(found['date'][:16].replace('T', ' '))} UTC. In the same run a matrix product of "
        f"{escape(limits['dtype'])} reached <b>{flops(limits['matmul_tflops'])}</b> and a copy "
        f"<b>{traffic(limits['copy_gbps'])}</b>: the ceilings that every rate below is held against. "
        f"{escape(kernels_are(found['device']['type']))}</p>"
        f"<p class='small'><code>{escape(found['command'])}</code></p>"
    )


def _run(run: dict[str, Any], found: dict[str, Any]) -> str:
    name = escape(run["name"])
    if "error" in run:
        return (
            f'<section class="run"><h2>{name}</h2><div class="box failed"><h3>This run failed</h3>'
            f"<p>{escape(run['error'])}</p></div></section>"
        )
    device = found["device"]["type"]
    cards = "".join(card(what, figure, remark) for what, figure, remark in headline(run))
    arrow = '<div class="arrow" aria-hidden="true">▼</div>'
    boxes, other = [], ""
    for layer in run["layers"]:
        box = _layer(layer, device, found["facts"] if run["name"] == "tilestack" else {})
        if layer["layer"] == OTHER:
            other = f'<div class="arrow"></div>{box}'
        else:
            boxes.append(box)
    return (
        f'<section class="run" aria-label="{name}"><h2>{name}</h2><div class="cards">{cards}</div>'
        f"{_strip(run, device)}{arrow.join(boxes)}{other}{_below(run)}</section>"
    )


def _strip(run: dict[str, Any], device: str) -> str:
    spans = "".join(
        f'<span class="{CLASSES[layer["layer"]]}" style="flex:{layer["share"]:.5f};background:var(--of)"></span>'
        for layer in run["layers"]
        if layer["share"] > 0
    )
    items = "".join(
        f'<li class="{CLASSES[layer["layer"]]}"><i></i>{escape(title_of(layer["layer"], device))} '
        f"{percent(layer['share']) or '0%'}</li>"
        for layer in run["layers"]
    )
    return f'<div class="strip" aria-hidden="true">{spans}</div><ul class="legend">{items}</ul>'


def _layer(layer: dict[str, Any], device: str, facts: dict[str, list[str]]) -> str:
    title = title_of(layer["layer"], device)
    lines = "".join(f"<li>{escape(line)}</li>" for line in facts.get(layer["layer"], []))
    more = f'<details><summary class="soft small">configuration</summary><ul class="facts mono">{lines}</ul></details>'
    return (
        f'<section class="box {CLASSES[layer["layer"]]}"><header><h3>{escape(title)}</h3>'
        f'<span class="soft small mono">{escape(folder_of(layer["layer"]))}</span>'
        f'<span class="num">{milliseconds(layer["ms"]) or "0"} ms <span class="soft">'
        f"{percent(layer['share']) or '0%'}</span></span></header>"
        f"{_entries(layer) if layer['entries'] else ''}{more if lines else ''}</section>"
    )


def _entries(layer: dict[str, Any]) -> str:
    rows = "".join(_entry(entry) for entry in layer["entries"] if entry["ms"] > 0)
    columns = {"share": "num", "ms": "num", "forward": "num wide", "backward": "num wide"}
    columns |= {"rate": "num rate", "of ceiling": "num ceiling"}
    heads = "".join(f'<th class="{kind}" scope="col">{name}</th>' for name, kind in columns.items())
    return (
        '<table class="entries"><thead><tr><th scope="col">what, and its kernels</th>'
        f'<th class="bar" scope="col"><span class="hidden">bar of the share</span></th>{heads}</tr></thead>'
        f"<tbody>{rows}</tbody></table>"
    )


def _entry(entry: dict[str, Any]) -> str:
    who = f'<span class="who">{escape(entry["implementation"])}</span>' if entry["implementation"] else ""
    again = entry["recompute_ms"]
    said = f' title="{milliseconds(again)} ms of it compute the forward pass again"' if again else ""
    ceiling = "" if entry["of_ceiling"] is None else f"{entry['of_ceiling']:.0%}"
    return (
        f"<tr><td><details><summary>{escape(entry['what'])}{who}</summary>{_kernels(entry)}</details></td>"
        f'<td class="bar"><span class="track"><span style="width:{100 * entry["share"]:.2f}%"></span></span></td>'
        f'<td class="num soft">{percent(entry["share"])}</td><td class="num"><b>{_ms(entry["ms"])}</b></td>'
        f'<td class="num wide">{milliseconds(entry["forward_ms"])}</td>'
        f'<td class="num wide"{said}>{milliseconds(entry["backward_ms"] + again)}{"*" if again else ""}</td>'
        f'<td class="num rate">{escape(rate(entry))}</td><td class="num ceiling">{ceiling}</td></tr>'
    )


def _ms(value: float) -> str:
    return milliseconds(value) or "0"


def _kernels(entry: dict[str, Any]) -> str:
    rows = "".join(
        f'<li><span class="mono" title="{escape(each["name"])}">{escape(kernel_name(each["name"]))}</span>'
        f"<span class='owner'>{escape(each['owner'])}</span>"
        f'<span class="num">{each["calls"]:,.4g} times</span><span class="num">{_ms(each["ms"])} ms</span></li>'
        for each in entry["kernels"][:MOST_KERNELS]
    )
    rest = entry["kernels"][MOST_KERNELS:]
    if rest:
        ms = milliseconds(sum(each["ms"] for each in rest)) or "0"
        more = f'<span class="mono">{len(rest)} more</span>'
        rows += f'<li>{more}<span class="owner"></span><span class="num"></span><span class="num">{ms} ms</span></li>'
    host = milliseconds(entry["host_ms"])
    note = f"<li>host: {host} ms a step</li>" if host else ""
    return f'<ul class="kernellist">{rows}{note}</ul>'


def _below(run: dict[str, Any]) -> str:
    owners = "".join(
        f"<li><i></i>{escape(each['owner'])}: {milliseconds(each['ms']) or 0} ms, {percent(each['share'])}, "
        f"{each['kernels']:,.0f} a step</li>"
        for each in run["owners"]
    )
    gaps = "".join(
        f"<tr><td class='num'>{milliseconds(gap['ms'])}</td>"
        f"<td class='mono small'>{escape(kernel_name(gap['before']))}</td>"
        f"<td class='mono small wide'>{escape(kernel_name(gap['host']))}</td></tr>"
        for gap in run["gaps"]
        if milliseconds(gap["ms"])
    )
    table = (
        "<details><summary class='small'>The longest gaps, in which nothing ran</summary><table><thead><tr>"
        "<th class='num' scope='col'>ms</th><th scope='col'>before this kernel</th>"
        f"<th class='wide' scope='col'>the host was in</th></tr></thead><tbody>{gaps}</tbody></table></details>"
    )
    again = any(entry["recompute_ms"] for layer in run["layers"] for entry in layer["entries"])
    star = "<p class='soft small'>* with what the backward pass computes again</p>" if again else ""
    return (
        f"{star}<p class='small soft' style='margin-top:14px'>By who wrote them:</p><ul class='legend'>{owners}</ul>"
        + (table if gaps else "")
    )


def _comparison(runs: list[dict[str, Any]]) -> str:
    ours, theirs = runs
    rows = compared(runs)
    most = max(max(row["ours"], row["theirs"]) for row in rows)
    body = "".join(_compared(row, most, last=row is rows[-1]) for row in rows if row["ours"] > 0 or row["theirs"] > 0)
    ratio = theirs["step_ms"] / ours["step_ms"]
    return (
        f"<h2>{ratio:.2f} times the speed of plain {escape(theirs['name'])}</h2>"
        '<p class="soft">The same weights, text, loop and optimizer; the model is transformers\' own, untouched, with '
        "the attention and the experts that it takes by itself. Milliseconds of a step.</p>"
        '<div class="box"><table class="compare"><thead><tr><th scope="col">part of a step</th>'
        f'<th class="pair" scope="col"><span class="chip ours">{escape(ours["name"])}</span> &nbsp; '
        f'<span class="chip theirs">{escape(theirs["name"])}</span></th>'
        f'<th class="num" scope="col">times faster</th></tr></thead><tbody>{body}</tbody></table></div>'
    )


def _compared(row: dict[str, Any], most: float, last: bool) -> str:
    pair = "".join(
        f'<div class="{who}"><span style="width:{80 * row[who] / most:.2f}%"></span>{_ms(row[who])}</div>'
        for who in ("ours", "theirs")
    )
    ratio = row["ratio"]
    shown = "" if ratio is None else f"{ratio:.2f}"
    kind = "" if ratio is None or 0.995 <= ratio <= 1.005 else "faster" if ratio > 1 else "slower"
    return (
        f'<tr{" class=total" if last else ""}><td>{escape(row["part"])}</td><td class="pair">{pair}</td>'
        f'<td class="num"><span class="{kind}">{shown}</span></td></tr>'
    )


def _timeline(run: dict[str, Any], number: int, device: str, longest: float) -> str:
    """The timeline of a run; `longest`: microseconds that are shown at first, the same for every run."""
    begin = run["timeline"]["view"][0]
    drawn = run["timeline"] | {
        "step": run["timeline"]["view"],
        "view": [begin, begin + longest],
        "entries": [
            [" ".join(filter(None, (entry["what"], entry["implementation"]))), LAYERS.index(layer["layer"]),
             title_of(layer["layer"], device), rate(entry)]
            for layer in run["layers"]
            for entry in layer["entries"]
        ]
    }  # fmt: skip
    kept = f"; {drawn['left_out']:,} short ranges of the host are left out" if drawn["left_out"] else ""
    buttons = "".join(
        f'<button type="button" data-key="{key}" aria-label="{what}">{shown}</button>'
        for key, shown, what in (
            ("+", "+", "zoom in"), ("-", "−", "zoom out"), ("s", "step", "show the device's step"),
            ("0", "all", "show all, from the host's first move on"),
            (",", "‹", "kernel before"), (".", "›", "next kernel"),
        )
    )  # fmt: skip
    text = json.dumps(drawn, separators=(",", ":")).replace("<", "\\u003c").replace("\u2028", "\\u2028")
    name = escape(run["name"])
    return (
        f'<div class="timeline"><div class="bar"><h3>{name}</h3>{buttons}<span class="soft small">'
        f"{milliseconds(longest / 1e3)} ms are shown{kept}</span></div>"
        f'<canvas tabindex="0" role="application" id="timeline-{number}" aria-label="Timeline of one step of {name}: '
        'what ran on the device, and what the host did. The tables above have the figures."></canvas>'
        '<div class="tip"></div>'
        f'<p class="said" aria-live="polite"></p><script type="application/json">{text}</script></div>'
    )


def _how(found: dict[str, Any]) -> str:
    configuration = escape(json.dumps(found["configuration"], indent=1))
    losses = "".join(
        f"<li>{escape(run['name'])}: {', '.join(f'{loss:.4f}' for loss in run['losses'])}</li>"
        for run in found["runs"]
        if "error" not in run
    )
    return (
        "<h2>How to read it</h2><p>Times are of one step, the mean over the traced ones. A share is of the time in "
        "which the device works, so shares add up to 100%; idle time stands beside. A kernel belongs to what launched "
        "it: an op of tilestack's, a module of the model or a stage of the loop, in the backward pass by the operator "
        "that it differentiates. What the profile does not let us place is in a box of its own.</p><p>A rate is the "
        "arithmetic or the traffic that an op cannot avoid (nothing computed twice, every tensor read or written once) "
        "over its time; “of ceiling” is the least time that the two ceilings allow for it, over the time that it took. "
        "Kernels that run side by side count in full, each.</p>"
        "<p class='small soft'>The losses of every step that ran, warm-up first:</p>"
        f"<ul class='small mono'>{losses}</ul><details><summary class='small'>the whole configuration"
        f"</summary><pre>{configuration}</pre></details>"
    )
