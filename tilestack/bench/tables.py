"""Tables of README and docs, made from the result files; `tests/test_tables.py` compares them.

A table stands between two markers and is replaced as a whole:

    <!-- table: step -->
    ...
    <!-- end -->
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path

from tilestack.bench.distributed_tables import distributed_block
from tilestack.bench.kernel_tables import attention_block, kvcache_block, moe_block
from tilestack.bench.memory_tables import adamw_block, plan_block, planned_table, timed_block
from tilestack.bench.results import FOLDER, ROOT, read
from tilestack.kernels import ops

FIGURES = ROOT / "docs" / "figures"
MARKER = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def documents() -> list[Path]:
    """Every Markdown file of the repository that may hold a table."""
    return sorted({ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("tilestack/**/README.md")})


def rewrite() -> list[Path]:
    """Bring every table and picture up to date; returns the files that were written."""
    from tilestack.bench.plots import PLOTS

    changed = []
    for bench, plot in PLOTS.items():
        for path in result_files(bench):
            plot(read(path), figure_of(path))
            changed.append(figure_of(path))
    for path in documents():
        text = path.read_text()
        fresh = with_tables(text)
        if fresh != text:
            path.write_text(fresh)
            changed.append(path)
    return changed


def with_tables(text: str) -> str:
    """The document with every table made anew."""
    return MARKER.sub(lambda match: match[1] + TABLES[match[2]]() + match[3], text)


def result_files(bench: str) -> list[Path]:
    """The result files of a bench, one a machine."""
    return sorted((FOLDER / bench).glob("*.json"))


def _runs(bench: str) -> list[dict]:
    return [read(path) for path in result_files(bench)]


def figure_of(path: Path) -> Path:
    """The picture of a result file: bench/results/attention/1xH100.json is docs/figures/attention-1xH100.png."""
    return FIGURES / f"{path.parent.name}-{path.stem}.png"


def step_table() -> str:
    """Training step: tilestack beside its rivals, a block for each machine."""
    blocks = []
    for run in _runs("step"):
        timed = [row for row in run["rows"] if row["op"] == "step" and not row["losses"]]
        lines = [
            _device_of_step(run),
            "",
            "| case | implementation | ms | tokens/s | TFLOP/s | peak GiB | times transformers |",
            "|---|---|---|---|---|---|---|",
            *[_step_line(row, timed) for row in sorted(timed, key=_by_case(timed))],
            *_longest_lines([row for row in run["rows"] if row["op"] == "longest_sequence"]),
            *_optimizer_lines([row for row in run["rows"] if row["op"] == "optimizer"], run["ceilings"]),
        ]
        blocks.append("\n".join(lines) + "\n")
    return "\n".join(blocks) or "Not measured yet.\n"


def longest_table() -> str:
    """The longest sequences of runs that measured no times."""
    blocks = []
    for run in _runs("longest"):
        rows = [row for row in run["rows"] if row["op"] == "longest_sequence"]
        blocks.append("\n".join([_device_of_step(run), *_longest_lines(rows)]) + "\n")
    return "\n".join(blocks) or "Not measured yet.\n"


def _device_of_step(run: dict) -> str:
    return (
        f"{run['device']}, torch {run['versions']['torch']}, triton {run['versions']['triton']}, transformers "
        f"{run['versions']['transformers']}, {run['date'][:10]}; this device's ceilings in the same run: "
        f"{run['ceilings']['matmul_tflops']:.0f} TFLOP/s (bf16 product), "
        f"{run['ceilings']['copy_gbps']:.0f} GB/s (copy)."
    )


def _by_case(rows: list[dict]) -> Callable[[dict], int]:
    """Sorts rows by where their case comes first; the order of the implementations stays."""
    order = []
    for row in rows:
        if row["case"] not in order:
            order.append(row["case"])
    return lambda row: order.index(row["case"])


def _step_line(row: dict, rows: list[dict]) -> str:
    case = row["case"]
    what = f"{case['layers']} layers, {case['batch']} x {case['seqlen']}"
    if row["error"]:
        reason = " ".join(row["error"].split()).replace("|", "/")[:80]
        return f"| {what} | {row['implementation']} | {reason} | | | | |"
    rivals = [each for each in rows if each["case"] == case and each["implementation"] == "transformers"]
    ratio = f"{rivals[0]['ms_median'] / row['ms_median']:.2f}" if rivals and rivals[0]["ms_median"] else ""
    return (
        f"| {what} | {row['implementation']} | {row['ms_median']:.1f} | {row['tokens_per_s']:,.0f} | "
        f"{row['tflops']:.0f} | {row['peak_gib']:.1f} | {ratio} |"
    )


def _longest_lines(rows: list[dict]) -> list[str]:
    """The longest sequence that trains on one GPU."""
    if not rows:
        return []
    lines = [
        "",
        "Longest sequence (batch 1) whose step fits on the GPU, in multiples of 4,096 tokens:",
        "",
        "| layers | checkpointing | implementation | tokens | peak GiB | times transformers |",
        "|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: row["case"]["checkpointing"]):
        case = row["case"]
        how = f"| {case['layers']} | {'yes' if case['checkpointing'] else 'no'} | {row['implementation']}"
        if row["error"]:
            lines.append(f"{how} | {' '.join(row['error'].split())[:80]} | | |")
            continue
        plain = [
            each["case"]["seqlen"]
            for each in rows
            if each["implementation"] == "transformers"
            and not each["error"]
            and each["case"]["checkpointing"] == case["checkpointing"]
        ]
        ratio = f"{case['seqlen'] / plain[0]:.1f}" if plain else ""
        lines.append(f"{how} | {case['seqlen']:,} | {row['peak_gib']:.1f} | {ratio} |")
    return lines


def _optimizer_lines(rows: list[dict], ceilings: dict[str, float]) -> list[str]:
    """The optimizer's step over the bytes that it has to move."""
    return [
        f"\nThe optimizer's step (AdamW, {row['case']['parameters'] / 1e9:.2f} billion parameters, 28 bytes each): "
        f"{row['ms_median']:.2f} ms, {row['gbps']:.0f} GB/s, {ceilings['copy_gbps'] / row['gbps']:.2f} times what "
        f"those bytes take at the copy's rate."
        for row in rows
        if not row["error"]
    ]


def losses_table() -> str:
    """The first losses of a training run, side by side."""
    blocks = []
    for run in [*_runs("step"), *_runs("longest")]:
        curves = {row["implementation"]: row["losses"] for row in run["rows"] if row["losses"]}
        if not curves:
            continue
        names = list(curves)
        lines = [f"| step | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
        for step, values in enumerate(zip(*curves.values(), strict=True), start=1):
            lines.append(f"| {step} | {' | '.join(f'{value:.4f}' for value in values)} |")
        blocks.append("\n".join(lines) + "\n")
    return "\n".join(blocks) or "Not measured yet.\n"


def ops_table() -> str:
    """Every op at the model's shapes: each implementation's median time, and rates where a floor is stated."""
    blocks = []
    for run in _runs("ops"):
        rows = [row for row in run["rows"] if not (row["error"] and "which is not installed" in row["error"])]
        with_floor = {row["op"] + row["case"]["case"] for row in rows if row["gbps"] or row["tflops"]}
        rated = [row for row in rows if row["op"] + row["case"]["case"] in with_floor]
        lines = [f"{run['device']}, {run['date'][:10]}, bf16, median ms of forward / forward and backward.", ""]
        lines += _plain_ops([row for row in rows if row not in rated])
        if rated:
            lines += ["", *_rated_ops(rated, run["ceilings"])]
        blocks.append("\n".join(lines) + "\n")
    return "\n".join(blocks) or "Not measured yet.\n"


def numerics_table() -> str:
    """How far the losses of bf16 runs are from float32, order by order."""
    from tilestack.bench.numerics import FACTOR, OURS, judge, losses_of

    blocks = []
    for path in result_files("numerics"):
        run = read(path)
        verdict = judge(losses_of(run["rows"]))
        names = list(dict.fromkeys(name for _, name in verdict.deviations))
        lines = [
            f"![loss minus float32's](figures/{figure_of(path).name})",
            "",
            f"{run['device']}, torch {run['versions']['torch']}, transformers {run['versions']['transformers']}, "
            f"{run['date'][:10]}. tilestack {'passes' if verdict.passed else 'FAILS'}: its largest distance is "
            f"{max(verdict.worst.values()):.2f} times the envelope, at most {FACTOR} is asked for; "
            f"{verdict.inside:.0%} of its steps lie inside the envelope itself.",
            "",
            f"| order | {' | '.join(f'{name}, RMS of D' for name in names)} | {OURS}, largest \\|D\\| / E |",
            "|---" * (len(names) + 2) + "|",
        ]
        for order in verdict.worst:
            squares = [[value**2 for value in verdict.deviations[order, name]] for name in names]
            cells = " | ".join(f"{(sum(each) / len(each)) ** 0.5:.5f}" for each in squares)
            lines.append(f"| {order} | {cells} | {verdict.worst[order]:.2f} |")
        blocks.append("\n".join(lines) + "\n")
    return "\n".join(blocks) or "Not measured yet.\n"


def trace_table() -> str:
    """Where a step's time goes, part by part, beside transformers."""
    from tilestack.app.trace.words import compared

    blocks = []
    for path in result_files("trace"):
        run = read(path)
        ours, theirs = run["rows"]
        model, data = run["configuration"]["model"], run["configuration"]["data"]
        waits = [f"{each['name']} waits for the GPU {each['host_waits']:g} times a step" for each in run["rows"]]
        lines = [
            f"{run['device']}, torch {run['versions']['torch']}, transformers {run['versions']['transformers']}, "
            f"{run['date'][:10]}; {model['layers']} layers, {data['micro_batch_tokens'] // data['sequence_length']} x "
            f"{data['sequence_length']} tokens, with the optimizer; peak {ours['peak_gib']:.1f} and "
            f"{theirs['peak_gib']:.1f} GiB; {', '.join(waits)}.",
            "",
            f"| part of a step | {ours['name']} ms | {theirs['name']} ms | times faster |",
            "|---|---|---|---|",
            *(
                f"| {row['part']} | {row['ours']:.2f} | {row['theirs']:.2f} | "
                f"{'' if row['ratio'] is None else format(row['ratio'], '.2f')} |"
                for row in compared([ours, theirs])
                if max(row["ours"], row["theirs"]) >= 0.1
            ),
        ]
        blocks.append("\n".join(lines) + "\n")
    return "\n".join(blocks) or "Not measured yet.\n"


def _by_call(rows: list[dict]) -> dict[tuple, dict[str, dict]]:
    found: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        found.setdefault((row["op"], row["case"]["case"], row["implementation"]), {})[row["direction"]] = row
    return found


def _plain_ops(rows: list[dict]) -> list[str]:
    def shown(row: dict | None) -> str:
        if row is None:
            return ""
        return row["error"].split("cannot take this call: ")[-1] if row["error"] else f"{row['ms_median']:.3f}"

    return [
        "| op | case | implementation | forward ms | forward and backward ms |",
        "|---|---|---|---|---|",
        *[
            f"| {' | '.join(key)} | {shown(cell.get('forward'))} | {shown(cell.get('both'))} |"
            for key, cell in _by_call(rows).items()
        ],
    ]


def _rated_ops(rows: list[dict], ceilings: dict[str, float]) -> list[str]:
    """Times and rates beside the rivals: GB/s of the bytes that the op at least moves, or TFLOP/s of its products."""

    def shown(row: dict | None) -> str:
        if row is None:
            return " | "
        if row["error"]:
            return " ".join(row["error"].split()).replace("|", "/")[:80] + " | "
        rate = (
            f"{row['gbps']:.0f} GB/s ({row['gbps'] / ceilings['copy_gbps']:.0%})"
            if row["gbps"]
            else f"{row['tflops']:.0f} TFLOP/s ({row['tflops'] / ceilings['matmul_tflops']:.0%})"
        )
        return f"{row['ms_median']:.3f} | {rate}"

    lines = [
        f"Rates count what the op at least moves or computes; in brackets, their share of this device's copy "
        f"({ceilings['copy_gbps']:.0f} GB/s) or bf16 product ({ceilings['matmul_tflops']:.0f} TFLOP/s).",
        "",
        "| op | case | implementation | forward ms | rate | forward and backward ms | rate | GiB above inputs |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for key, cell in _by_call(rows).items():
        last = cell.get("both") or cell["forward"]
        peak = "" if last["peak_gib"] is None else f"{last['peak_gib']:.2f}"
        lines.append(f"| {' | '.join(key)} | {shown(cell.get('forward'))} | {shown(cell.get('both'))} | {peak} |")
    return lines


def fp8_table() -> str:
    """What fp8 could bring to the experts."""
    from tilestack.bench.fp8 import table

    return "\n".join(table(run) for run in _runs("fp8")) or "Not measured yet.\n"


def _of_kernel(bench: str, block: Callable[[dict], str]) -> str:
    """For the README of an op, three folders down: a picture and tables for each machine."""
    blocks = [
        f"![TFLOP/s of {bench}](../../../docs/figures/{figure_of(path).name})\n\n{block(read(path))}"
        for path in result_files(bench)
    ]
    return "\n".join(blocks) or "Not measured yet.\n"


def _each_run(bench: str, block: Callable[[dict], str]) -> str:
    """A table for each machine, and which it was."""
    blocks = [f"{run['device']}, {run['date'][:10]}:\n\n{block(run)}" for run in _runs(bench)]
    return "\n".join(blocks) or "Not measured yet.\n"


def kvcache_table() -> str:
    """A decoding step over a cache, a table for each machine."""
    return "\n".join(kvcache_block(run) for run in _runs("kvcache")) or "Not measured yet.\n"


def trust_table(op: str | None = None) -> str:
    """Which checks passed on a GPU, of one op or of all, a table for each machine."""
    from tilestack.bench.trust import block

    return "\n".join(block(run, op) for run in _runs("trust")) or "Not run yet.\n"


def equality_table() -> str:
    """How far a training that is split over processes is from that of one."""
    from tilestack.bench.equality import block

    return "\n".join(map(block, _runs("equality"))) or "Not run yet.\n"


def distributed_table() -> str:
    """Whole steps on several GPUs, a table for each machine."""
    return "\n".join(map(distributed_block, _runs("distributed"))) or "Not measured yet.\n"


def scaling_table() -> str:
    """The step on many GPUs, as the model of it says."""
    from tilestack.bench.scaling import measured, table

    return table(measured())


TABLES: dict[str, Callable[[], str]] = {
    "step": step_table,
    "longest": longest_table,
    "losses": losses_table,
    "ops": ops_table,
    "numerics": numerics_table,
    "trace": trace_table,
    "attention": lambda: _of_kernel("attention", attention_block),
    "kvcache": kvcache_table,
    "moe": lambda: _of_kernel("moe", moe_block),
    "fp8": fp8_table,
    "equality": equality_table,
    "trust": trust_table,
    **{f"trust_{op}": functools.partial(trust_table, op) for op in (*ops(), "flash_attn", "model")},
    "plan": lambda: _each_run("plan", plan_block),
    "plan_timed": lambda: _each_run("distributed", timed_block),
    "planned": planned_table,
    "adamw": lambda: _each_run("adamw", adamw_block),
    "distributed": distributed_table,
    "scaling": scaling_table,
}
