"""The tables of `bench distributed` in docs/measurements.md."""

from __future__ import annotations

from tilestack.bench.distributed import state_of


def distributed_block(run: dict) -> str:
    """One machine: steps beside the rival, what the links carry, and how soon a broken job ends."""
    steps = [row for row in run["rows"] if row["op"] == "step"]
    versions = run["versions"]
    torch, transformers, deepspeed = (versions.get(name) for name in ("torch", "transformers", "deepspeed"))
    lines = [
        f"{_gpus(run)} x {run['device']}, torch {torch}, transformers {transformers}, DeepSpeed {deepspeed}, "
        f"{run['date'][:10]}{_noted(run)}. Milliseconds are of whole steps, with the optimizer; rates and peak memory "
        "are a GPU's; exposed: collectives that nothing hides; idle: nothing runs.",
        "",
        "| layers | a GPU | split | recomputed | implementation | ms | tokens/s | TFLOP/s | GiB | exposed | idle ms |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
        *[_step(row) for row in sorted(steps, key=lambda row: row["case"]["layers"])],
        "",
        *_comparisons([row for row in steps if not row["error"]]),
    ]
    lines += _losses([row for row in steps if row["losses"]])
    links = [row for row in run["rows"] if row["op"] == "link" and not row["error"]]
    if links:
        rates = ", ".join(f"{row['case']['collective']} {row['gbps']:.0f}" for row in links)
        lines += ["", f"What a GPU receives from the others in a collective of {_mib(links[0])} MiB, GB/s: {rates}."]
    for row in run["rows"]:
        if row["op"] == "failure":
            lines += ["", _failure(row)]
    return "\n".join(lines) + "\n"


def _noted(run: dict) -> str:
    return f" ({run['note']})" if "note" in run else ""


def _gpus(run: dict) -> int:
    return max(row["case"].get("gpus", 1) for row in run["rows"])


def _mib(link: dict) -> int:
    return link["case"]["bytes"] >> 20


def _step(row: dict) -> str:
    case = row["case"]
    tokens = f"{case['batch']} x {case['seqlen']:,}"
    head = f"| {case['layers']} | {tokens} | {split_of(case)} | {case['checkpointing']} | {row['implementation']} |"
    if row["error"]:
        return f"{head} {' '.join(row['error'].split()).replace('|', '/')[:80]} | | | | | |"
    times = " | ".join("" if row[name] is None else f"{row[name]:.1f}" for name in ("exposed_ms", "idle_ms"))
    rates = f"{row['ms_median']:.1f} | {row['tokens_per_s']:,.0f} | {row['tflops']:.0f} | {row['peak_gib']:.1f}"
    return f"{head} {rates} | {times} |"


def split_of(case: dict) -> str:
    """How GPUs share a step, and what is not as usual about the optimizer's state."""
    split = [f"ZeRO-{case['zero']}"] if case["gpus"] > 1 else ["one GPU"]
    split += [f"experts over {case['expert_parallel']}"] if case["expert_parallel"] > 1 else []
    split += [f"rows over {case['sequence_parallel']}"] if case["sequence_parallel"] > 1 else []
    return ", ".join(split) + state_of(case)


def _losses(steps: list[dict]) -> list[str]:
    """The first losses of the runs that begin with the same weights and see the same text, where there are several."""
    found: dict[tuple, list[dict]] = {}
    for row in steps:
        case = row["case"]
        found.setdefault(tuple(case[key] for key in ("layers", "batch", "seqlen", "gpus")), []).append(row)
    lines = []
    for (layers, batch, seqlen, _), rows in found.items():
        if len(rows) > 1:
            lines += ["", f"Losses of the first steps, {layers} layers, {batch} x {seqlen:,} a GPU, the same text:", ""]
            lines += [f"- {row['implementation']}, {split_of(row['case'])}: {_numbers(row['losses'])}" for row in rows]
    return lines


def _numbers(losses: list[float]) -> str:
    return ", ".join(f"{loss:.4f}" for loss in losses)


def _comparisons(steps: list[dict]) -> list[str]:
    """The best of each implementation at each depth, and several GPUs beside one."""
    said = []
    for layers in sorted({row["case"]["layers"] for row in steps}):
        several = [row for row in steps if row["case"]["layers"] == layers and row["case"]["gpus"] > 1]
        several = [row for row in several if row["case"]["seqlen"] == 4096]
        if any(row["implementation"] != "tilestack" for row in several):  # with the same state, if there is such a row
            several = [row for row in several if not state_of(row["case"])] or several
        best = {name: _best(several, name) for name in {row["implementation"] for row in several}}
        rivals = [row for name, row in best.items() if name != "tilestack"]
        if "tilestack" in best and rivals:
            ours, theirs = best["tilestack"]["tokens_per_s"], rivals[0]["tokens_per_s"]
            state = state_of(best["tilestack"]["case"]).removeprefix(", ")
            said.append(
                f"{layers} layers, the best of each: {ours / theirs:.2f} times {rivals[0]['implementation']}"
                + (f" (ours: {state})." if state else ".")
            )
        alone = [row for row in steps if row["case"]["layers"] == layers and row["case"]["gpus"] == 1]
        same = [row for row in several if row["implementation"] == "tilestack" and alone and _like(row, alone[0])]
        if same:
            most = max(same, key=lambda row: row["tflops"])
            share = most["tflops"] / alone[0]["tflops"]
            said.append(f"The same step on one GPU: each of {most['case']['gpus']} reaches {share:.1%} of its TFLOP/s.")
    return [" ".join(said)] if said else []


def _best(rows: list[dict], name: str) -> dict:
    return max((row for row in rows if row["implementation"] == name), key=lambda row: row["tokens_per_s"])


def _like(row: dict, alone: dict) -> bool:
    return all(row["case"][key] == alone["case"][key] for key in ("batch", "seqlen", "checkpointing"))


def _failure(row: dict) -> str:
    if row["case"]["harm"] == "killed":
        what = "A rank killed with SIGKILL between two collectives of a step"
    else:
        what = f"A rank that hangs there, with distributed.timeout = {row['case']['timeout_s']:.0f} s"
    if row["error"] or row["ms_median"] is None:
        return f"{what}: the check failed."
    return f"{what}: all ranks had ended {row['ms_median'] / 1e3:.1f} s later, and the message named it."
