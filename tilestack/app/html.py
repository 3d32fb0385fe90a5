"""Pages that need nothing from elsewhere: one HTML file with its styles, its script and its pictures inside."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files


def document(title: str, body: str, script: str = "") -> str:
    """A whole page. title is text, body and script are what goes in as it is."""
    style = files("tilestack.app").joinpath("page.css").read_text(encoding="utf-8")
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{style}</style></head>\n'
        f"<body><main>\n{body}\n</main>{f'<script>{script}</script>' if script else ''}</body></html>\n"
    )


def card(name: str, figure: str, remark: str = "") -> str:
    """A figure that stands out, with its name above and a remark below."""
    return (
        f'<div class="card"><span class="soft small">{escape(name)}</span><b>{escape(figure)}</b>'
        f'<span class="soft small">{escape(remark)}</span></div>'
    )


@dataclass(frozen=True)
class Line:
    """A line of a chart: its points, and the class of style.css that gives its colour. dots: mark every point."""

    name: str
    points: Sequence[tuple[float, float]]
    style: str
    dots: bool = False


WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 760, 260, 62, 34, 10, 12


def chart(lines: Sequence[Line], across: str, up: str, from_zero: bool = False) -> str:
    """A picture of lines over the same axis, as SVG; points that are not finite leave a gap. "" if there is none."""
    shown = [Line(line.name, [p for p in line.points if math.isfinite(p[1])], line.style, line.dots) for line in lines]
    points = [point for line in shown for point in line.points]
    if not points:
        return ""
    (left, right), (low, high) = (_span([p[axis] for p in points]) for axis in (0, 1))
    low = min(0.0, low) if from_zero else low
    ticks_up, ticks_across = _ticks(low, high), _ticks(left, right)
    low, high = min(low, ticks_up[0]), max(high, ticks_up[-1])

    def x(value: float) -> float:
        return LEFT + (value - left) / (right - left) * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - BOTTOM - TOP)

    grid = "".join(
        f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>'
        f'<text x="{LEFT - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">{_label(tick)}</text>'
        for tick in ticks_up
    ) + "".join(
        f'<text x="{x(tick):.1f}" y="{HEIGHT - BOTTOM + 17}" text-anchor="middle">{_label(tick)}</text>'
        for tick in ticks_across
    )
    drawn = "".join(_line(line, x, y) for line in shown)
    names = "".join(f'<li class="{line.style}"><i></i>{escape(line.name)}</li>' for line in shown if line.points)
    last = "; ".join(f"{line.name}: {line.points[-1][1]:.4g} at the end" for line in shown if line.points)
    return (
        f'<figure class="chart"><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(up)} over '
        f'{escape(across)}; {escape(last)}">{grid}{drawn}<text x="{WIDTH - RIGHT}" y="{HEIGHT - 3}" text-anchor="end">'
        f'{escape(across)}</text></svg><figcaption><ul class="legend"><li><b>{escape(up)}</b></li>{names}</ul>'
        "</figcaption></figure>"
    )


def _line(line: Line, x, y) -> str:
    path = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in line.points)
    dots = "".join(
        f'<circle cx="{x(a):.1f}" cy="{y(b):.1f}" r="3.5"><title>{escape(line.name)} at {a:g}: {b:.4g}</title></circle>'
        for a, b in (line.points if line.dots or len(line.points) == 1 else ())
    )
    return f'<g class="{line.style}"><polyline points="{path}"/>{dots}</g>'


def _span(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers between low and high."""
    rough = (high - low) / about
    power = 10 ** math.floor(math.log10(rough))
    step = next(each * power for each in (1, 2, 5, 10) if each * power >= rough)
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def _label(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
