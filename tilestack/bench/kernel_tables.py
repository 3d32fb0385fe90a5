"""Tables of attention and of the MoE block, from one run's result file each."""

from __future__ import annotations

from collections.abc import Iterable

from tilestack.bench.moe import roofline_tflops

OURS = ("tilestack", "tilestack-triton")
ORDER = (
    *OURS, "cudnn", "sdpa-flash", "flash-attn-2", "flash-attn-4", "xformers", "transformers", "transformers-compile",
    "liger", "sonic-moe",
)  # fmt: skip
DIRECTIONS = ("forward", "backward")


def heading(run: dict) -> str:
    """On what, when and with which ceilings a run was made; then what its file has to say of it."""
    versions = ", ".join(
        f"{name} {run['versions'][name]}"
        for name in ("torch", "triton", "cudnn", "transformers", "flash-attn-4")
        if name in run["versions"]
    )
    note = run.get("note")
    return (
        f"{run['device']}, {versions}, {run['date'][:10]}; this device's ceilings{'' if note else ' in the same run'}: "
        f"{run['ceilings']['matmul_tflops']:.0f} TFLOP/s (bf16 product), "
        f"{run['ceilings']['copy_gbps']:.0f} GB/s (copy)." + (f" Note: {note}" if note else "")
    )


def ordered(names: Iterable[str]) -> list[str]:
    """Ours first, then the rivals."""
    return sorted(set(names), key=lambda name: (ORDER.index(name) if name in ORDER else len(ORDER), name))


def attention_block(run: dict) -> str:
    """TFLOP/s over sequence lengths, a table for each kind of shape; then what a call costs the host."""
    speed = [row for row in run["rows"] if row["ms_median"] is not None]
    lines = [heading(run), "", _spread(speed), ""]
    for family in dict.fromkeys(map(attention_family, speed)):
        lines += [f"**{family}**, TFLOP/s forward / backward", ""]
        lines += _family([row for row in speed if attention_family(row) == family])
        lines.append("")
    lines += _calls(run["rows"], "4 x 4096 tokens")
    return "\n".join([*lines, *failures(run["rows"])]).rstrip() + "\n"


def attention_family(row: dict) -> str:
    """What the rows of one table share."""
    case = row["case"]
    words = [f"{case['heads']} query heads, {case['kv_heads']} key heads of {case['head_dim']}"]
    words.append("causal" if case["causal"] else "not causal")
    words += ["packed documents"] * (case["layout"] == "packed") + ["deterministic"] * case["deterministic"]
    words += [f"window of {case['window'][0] + 1} keys"] * (case["window"][0] >= 0)
    return ", ".join(words)


def size(case: dict) -> str:
    """The first column of a table: what grows."""
    if case["lengths"]:
        return f"{len(case['lengths'])} documents, {case['seqlen']} tokens"
    return f"{case['batch']} x {case['seqlen']}"


def _family(rows: list[dict]) -> list[str]:
    names = ordered(row["implementation"] for row in rows)
    lines = [
        f"| batch x length | {' | '.join(names)} | tilestack over the best rival |",
        "|---" * (len(names) + 2) + "|",
    ]
    for what in dict.fromkeys(size(row["case"]) for row in rows):
        here = {(row["implementation"], row["direction"]): row["tflops"] for row in rows if size(row["case"]) == what}
        cells = [_pair([here.get((name, direction)) for direction in DIRECTIONS], ".0f") for name in names]
        ratios = _pair([ratio(here, names, direction) for direction in DIRECTIONS], ".2f")
        lines.append(f"| {what} | {' | '.join(cells)} | {ratios} |")
    return lines


def _pair(values: list[float | None], form: str) -> str:
    if all(value is None for value in values):
        return ""
    return " / ".join("-" if value is None else f"{value:{form}}" for value in values)


def ratio(rates: dict[tuple[str, str], float], names: list[str], direction: str) -> float | None:
    """The rate of tilestack over that of the fastest rival; None where one of them is missing."""
    rivals = [rates[name, direction] for name in names if name not in OURS and (name, direction) in rates]
    own = rates.get(("tilestack", direction))
    return own / max(rivals) if own and rivals else None


def _spread(rows: list[dict]) -> str:
    if not rows:
        return "Nothing was timed."
    if any(row["ms_max"] is None for row in rows):
        return "Medians."
    spreads = sorted((row["ms_max"] - row["ms_min"]) / row["ms_median"] for row in rows)
    return (
        f"Medians; between the fastest and the slowest repeat lie {spreads[len(spreads) // 2]:.1%} of the median in "
        f"the middle row and {spreads[-1]:.1%} in the worst."
    )


def _calls(rows: list[dict], first_case: str) -> list[str]:
    host = {row["implementation"]: row["overhead_us"] for row in rows if _is_host_time(row)}
    first = [row for row in rows if row["cold_s"] is not None]
    if not host and not first:
        return []
    columns = {
        "host us": (host, ".0f"),
        "first call, nothing compiled, s": ({row["implementation"]: row["cold_s"] for row in first}, ".2f"),
        "first call, compiled before, s": ({row["implementation"]: row["warm_s"] for row in first}, ".2f"),
    }
    columns = {title: column for title, column in columns.items() if column[0]}
    what = "forward and backward"
    lines = [
        f"Host time of {what} at 1 x 128 tokens, and the first {what} of a process at {first_case}, without and with"
        if host
        else f"The first {what} of a process at {first_case}, without and with",
        "compiled kernels on the disk:",
        "",
        f"| implementation | {' | '.join(columns)} |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for name in ordered(name for values, _ in columns.values() for name in values):
        cells = [(values.get(name), form) for values, form in columns.values()]
        shown = ["" if value is None else f"{value:{form}}" for value, form in cells]
        lines.append(f"| {name} | {' | '.join(shown)} |")
    return [*lines, ""]


def _is_host_time(row: dict) -> bool:
    """Of a row that was made for it: beside a time on the GPU, host time is only a remark."""
    return row["overhead_us"] is not None and row["ms_median"] is None


def failures(rows: list[dict]) -> list[str]:
    """What could not be timed, and why."""
    failed = [row for row in rows if isinstance(row["error"], str)]
    if not failed:
        return []
    lines = ["Not timed:", "", "| case | implementation | why |", "|---|---|---|"]
    for row in failed:
        case = row["case"]
        what = (
            f"{attention_family(row)}, {size(case)}"
            if "heads" in case
            else f"{case['tokens']} tokens, {case['routing']}"
        )
        reason = " ".join(row["error"].split())[:120].replace("|", "/")
        lines.append(f"| {what} | {row['implementation']} | {reason} |")
    return lines


def kvcache_block(run: dict) -> str:
    """GB/s of keys and values, beside those of a copy."""
    timed = [row for row in run["rows"] if row["ms_median"] is not None]
    names = ordered(row["implementation"] for row in timed)
    lines = [
        heading(run), "", _spread(timed), "",
        f"| GB/s over keys and values | {' | '.join(names)} | tilestack over a copy |", "|---" * (len(names) + 2) + "|",
    ]  # fmt: skip
    for what in dict.fromkeys(row["case"]["case"] for row in timed):
        rates = {row["implementation"]: row["gbps"] for row in timed if row["case"]["case"] == what}
        cells = [f"{rates[name]:.0f}" if name in rates else "" for name in names]
        own = f"{rates['tilestack-triton'] / run['ceilings']['copy_gbps']:.2f}" if "tilestack-triton" in rates else ""
        lines.append(f"| {what} | {' | '.join(cells)} | {own} |")
    return "\n".join([*lines, *_not_timed(run["rows"])]) + "\n"


def _not_timed(rows: list[dict]) -> list[str]:
    failed = [row for row in rows if isinstance(row["error"], str)]
    return ["", *(f"- {row['case']['case']}, {row['implementation']}: {' '.join(row['error'].split())[:120]}"
                  for row in failed)] if failed else []  # fmt: skip


def moe_block(run: dict) -> str:
    """The block forward, and forward and backward, beside the roofline."""
    timed = [row for row in run["rows"] if row["ms_median"] is not None]
    found: dict[tuple, dict[str, dict]] = {}
    for row in timed:
        key = (row["case"]["tokens"], row["case"]["routing"], row["implementation"])
        found.setdefault(key, {})[row["direction"]] = row
    found = dict(sorted(found.items(), key=lambda item: item[0][:2]))  # by tokens and routing
    lines = [
        heading(run), "",
        "TFLOP/s (share of the roofline): 6 T K H I forward, 18 in all.", "",
        "| tokens | routing | implementation | forward ms | forward TFLOP/s | forward and backward ms "
        "| forward and backward TFLOP/s | peak GiB | times transformers |",
        "|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for (tokens, routing, name), cell in found.items():
        rival = found.get((tokens, routing, "transformers"), {}).get("both")
        both = cell.get("both")
        times = f"{rival['ms_median'] / both['ms_median']:.2f}" if rival and both else ""
        peak = f"{both['peak_gib']:.1f}" if both else ""
        shown = [_moe_cell(cell.get(direction), run["ceilings"]) for direction in ("forward", "both")]
        lines.append(f"| {tokens} | {routing} | {name} | {' | '.join(shown)} | {peak} | {times} |")
    lines += ["", *_skew(found), *_calls(run["rows"], "4096 tokens")]
    return "\n".join([*lines, *failures(run["rows"])]).rstrip() + "\n"


def _moe_cell(row: dict | None, ceilings: dict[str, float]) -> str:
    if row is None:
        return " | "
    share = row["tflops"] / roofline_tflops(row["case"], row["direction"], ceilings)
    return f"{row['ms_median']:.2f} | {row['tflops']:.0f} ({share:.0%})"


def _skew(found: dict[tuple, dict[str, dict]]) -> list[str]:
    lines = []
    for tokens, routing, name in found:
        random = found.get((tokens, "random", name), {}).get("both")
        skewed = found[tokens, routing, name].get("both")
        if routing == "skewed" and name == "tilestack" and random and skewed:
            cost = skewed["ms_median"] / random["ms_median"] - 1
            lines.append(f"Skewed routing costs tilestack {cost:+.1%} at {tokens} tokens.")
    return [*lines, ""] if lines else []
