"""`tilestack report`: one page about a run, from what the run left in its folder."""

from __future__ import annotations

import datetime
from html import escape
from pathlib import Path
from typing import Any

from tilestack.app import checkpoints
from tilestack.app.config import OutputConfig
from tilestack.app.display import duration
from tilestack.app.errors import UserError
from tilestack.app.files import write_text
from tilestack.app.html import Line, card, chart, document
from tilestack.app.metrics import MetricsFile
from tilestack.app.start import CONFIG, Run
from tilestack.app.usage import REPORT


def main(argv: list[str]) -> int:
    """The command line; returns the exit code. Raises UserError for wrong input."""
    name, *rest = argv
    if rest and (len(rest) != 2 or rest[0] != "--out") or name.startswith("-"):
        raise UserError(f"tilestack report takes the folder of a run and --out FILE, got {' '.join(argv)!r}\n{REPORT}")
    run = Run(_find(name))
    path = Path(rest[1]) if rest else run.folder / "report.html"
    text = report(run)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    except OSError as error:
        raise UserError(f"--out: {path} cannot be written: {error}") from None
    print(f"report: {path}")
    return 0


def _find(name: str) -> Path:
    if name != "latest":
        if not (Path(name) / CONFIG).is_file():
            raise UserError(f"{name} is not the folder of a run (it has no {CONFIG})")
        return Path(name)
    parent = Path(OutputConfig().folder)
    runs = [path.parent for path in parent.glob("*/metrics.jsonl")]
    if not runs:
        raise UserError(f"latest: {parent}/ has no run with metrics; name the folder of one")
    return max(runs, key=lambda folder: folder.name)


def report(run: Run) -> str:
    """The page. Raises UserError if the run has not finished a step."""
    records = MetricsFile(run.metrics).read()
    if not records:
        raise UserError(f"{run.folder} has no finished step in metrics.jsonl yet")
    body = [
        f"<h1>{escape(run.folder.name)}</h1><p class='soft'>{_state(run, records)}</p>",
        f'<div class="run"><div class="cards">{_cards(records)}</div></div>',
        *_charts(records),
        _checkpoints(run),
        _text("Sample", run.folder / "sample.txt", opened=True),
        _text("Configuration", run.folder / CONFIG),
    ]
    return document(f"tilestack run {run.folder.name}", "\n".join(body))


def _state(run: Run, records: list[dict[str, Any]]) -> str:
    last = records[-1]
    written = datetime.datetime.fromtimestamp(run.metrics.stat().st_mtime).isoformat(" ", "minutes")
    done = "the model is in " + str(run.export) if run.export.is_dir() else "not exported"
    return escape(f"step {last['step']:,}, {duration(last['seconds'])} of training, last written {written}; {done}")


def _cards(records: list[dict[str, Any]]) -> str:
    first, last = records[0], records[-1]
    held_out = [record for record in records if "eval_loss" in record]
    best = min(held_out, key=lambda record: record["eval_loss"], default=None)
    speed = sorted(record["tokens_per_second"] for record in records)[len(records) // 2]
    cards = [
        card("loss", f"{last['loss']:.4f}", f"{first['loss']:.4f} at step {first['step']}"),
        card("on held-out text", f"{best['eval_loss']:.4f}" if best else "n/a",
             f"lowest, at step {best['step']:,}" if best else "was not measured"),
        card("speed", f"{speed:,.0f} tokens/s", "median over the steps"),
        card("MFU", "n/a" if last["mfu"] is None else f"{last['mfu']:.1%}", "of the device's peak, last steps"),
        card("memory", f"{last['memory_gib']:.1f} GiB", "peak"),
        card("learning rate", f"{last['lr']:.2e}", f"epoch {last['epoch'] + 1}"),
    ]  # fmt: skip
    return "".join(cards)


def _charts(records: list[dict[str, Any]]) -> list[str]:
    def points(key: str) -> list[tuple[float, float]]:
        return [(record["step"], record[key]) for record in records if record.get(key) is not None]

    pictures = [
        chart([Line("training", points("loss"), "distributed"),
               Line("held-out text", points("eval_loss"), "model", dots=True)], "step", "loss (nats a token)"),
        chart([Line("tokens a second", points("tokens_per_second"), "kernels")], "step", "speed", from_zero=True),
        chart([Line("norm before clipping", points("grad_norm"), "libraries")], "step", "gradient", from_zero=True),
        chart([Line("largest over mean", points("expert_load"), "application")], "step", "load of the experts"),
        chart([Line("learning rate", points("lr"), "host")], "step", "learning rate", from_zero=True),
    ]  # fmt: skip
    return ['<div class="charts">', *pictures, "</div>"]


def _checkpoints(run: Run) -> str:
    rows = "".join(
        f"<tr><td class='mono'>{escape(str(folder))}</td><td class='num'>{_gib(folder)}</td>"
        f"<td class='num'>{datetime.datetime.fromtimestamp(folder.stat().st_mtime).isoformat(' ', 'minutes')}</td></tr>"
        for folder in checkpoints.complete(run.checkpoints)
    )
    if not rows:
        return "<h2>Checkpoints</h2><p>There is no complete checkpoint.</p>"
    return (
        "<h2>Checkpoints</h2><p>To go on from the newest: "
        f"<code>python train.py --resume {escape(str(run.folder))}</code></p>"
        "<div class='box'><table><thead><tr><th scope='col'>folder</th><th class='num' scope='col'>size</th>"
        f"<th class='num' scope='col'>written</th></tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _gib(folder: Path) -> str:
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return f"{size / 2**30:.2f} GiB" if size >= 2**27 else f"{size / 2**20:.1f} MiB"


def _text(title: str, path: Path, opened: bool = False) -> str:
    if not path.is_file():
        return ""
    text = escape(path.read_text(encoding="utf-8", errors="replace"))
    state = " open" if opened else ""
    return f"<h2>{title}</h2><details{state}><summary>{escape(path.name)}</summary><pre>{text}</pre></details>"
