"""The tables of docs/scaling.md: the model of a step on many GPUs, with the rates that the result files have."""

from __future__ import annotations

import dataclasses
import statistics
from dataclasses import dataclass
from pathlib import Path

from tilestack.app.plan.proposals import update_bytes
from tilestack.bench.distributed_tables import split_of
from tilestack.bench.memory import training_of
from tilestack.bench.memory_tables import case_of_step
from tilestack.bench.results import FOLDER, read
from tilestack.bench.step import qwen3_30b_a3b
from tilestack.distributed.step_model import H100, Layout, Machine, interpolated, step_time, tflops
from tilestack.models.flops import training_flops_per_token

GLUE = ("norms and residuals", "q and k norm, rotary", "router")
SCALES = (8, 64, 512)
EFFICIENT = 0.8  # of what a GPU does on the fewest: below that a configuration has stopped scaling
MOST = 4096
FULL = qwen3_30b_a3b(48)
STEP_TOKENS = 1 << 22  # of the whole step, where the batch is fixed: 1,024 sequences of 4,096


@dataclass(frozen=True)
class Plan:
    """A configuration whose split stays as it is while GPUs are added: they add data."""

    name: str
    layout: Layout

    def at(self, gpus: int) -> Layout:
        """With so many GPUs, each with as much work."""
        return dataclasses.replace(self.layout, gpus=gpus)

    def with_fixed_step(self, gpus: int) -> Layout | None:
        """With STEP_TOKENS a step: fewer micro-batches, then smaller ones; None below one sequence."""
        own = STEP_TOKENS * self.layout.sequence_parallel // gpus
        tokens = min(own, self.layout.micro_batch_tokens)
        if tokens < self.layout.seqlen:
            return None
        return dataclasses.replace(self.layout, gpus=gpus, micro_batch_tokens=tokens, accumulation=own // tokens)


_ROWS = {"micro_batch_tokens": 4 * 4096, "seqlen": 4096}
PLANS = (
    Plan("ZeRO-3", Layout(zero=3, checkpointing="full", **_ROWS)),
    Plan("ZeRO-2, experts over 8", Layout(zero=2, expert_parallel=8, checkpointing="full", **_ROWS)),
    Plan(
        "ZeRO-1, experts over 8, 4 micro-batches",
        Layout(zero=1, expert_parallel=8, checkpointing="full", accumulation=4, **_ROWS),
    ),
    Plan(
        "ZeRO-3, rows of 131,072 over 8",
        Layout(zero=3, sequence_parallel=8, checkpointing="full", micro_batch_tokens=131072, seqlen=131072),
    ),
)


def stops_at(plan: Plan, machine: Machine) -> int | None:
    """The fewest GPUs, a power of two, on which each does less than EFFICIENT of what it does on 8; None up to MOST."""
    best, gpus = _tflops(plan.at(SCALES[0]), machine), 2 * SCALES[0]
    while gpus <= MOST:
        if _tflops(plan.at(gpus), machine) < EFFICIENT * best:
            return gpus
        gpus *= 2
    return None


def _tflops(layout: Layout, machine: Machine) -> float:
    return tflops(FULL, layout, step_time(FULL, layout, machine))


def table(machine: Machine) -> str:
    """Both tables, below the rates that they come from."""
    forward, backward = interpolated(machine.attention, 4096)
    _, experts = interpolated(machine.experts, 1024)
    scales = " | ".join(f"{gpus} GPUs" for gpus in SCALES)
    lines = [
        f"Measured, a GPU: attention {forward:.0f} TFLOP/s forward and {backward:.0f} backward (4,096 tokens), experts "
        f"{experts:.0f} (1,024 rows each), projections {machine.projections:.0f}, LM head "
        f"{machine.head:.0f}; norms, rotary and router {machine.glue_ns:.0f} ns a token and layer; copies "
        f"{machine.copy:.0f} GB/s; {machine.node_link:.0f} GB/s received from another GPU of the node.",
        "",
        f"Assumed: {machine.network:.0f} GB/s a GPU between nodes of {machine.gpus_per_node}, a hop of "
        f"{machine.node_hop:.0f} us inside a node and {machine.network_hop:.0f} us between nodes, "
        f"{machine.hidden_share:.0%} of a pass can hide what is sent beside it. From the steps below: "
        f"{machine.host_wait / 1e3:.1f} ms lost each time that the host waits for sizes.",
        "",
        f"| each GPU with the same work | {scales} | less than {EFFICIENT:.0%} of 8 GPUs' rate |",
        "|---" * (len(SCALES) + 2) + "|",
    ]
    for plan in PLANS:
        stop = stops_at(plan, machine)
        cells = [_cell(plan.at(gpus), machine) for gpus in SCALES]
        lines.append(f"| {plan.name} | {' | '.join(cells)} | {f'from {stop:,} GPUs' if stop else 'not in sight'} |")
    head = f"| {STEP_TOKENS:,} tokens a step on all GPUs | {scales} |"
    lines += ["", head, "|---" * (len(SCALES) + 1) + "|"]
    for plan in PLANS:
        layouts = [plan.with_fixed_step(gpus) for gpus in SCALES]
        cells = ["not enough for a row each" if each is None else _cell(each, machine) for each in layouts]
        lines.append(f"| {plan.name} | {' | '.join(cells)} |")
    return "\n".join([*lines, *against_measured(machine)]) + "\n"


def against_measured(machine: Machine, folder: Path = FOLDER) -> list[str]:
    """What the model says of the steps that several GPUs ran, at their own rate of copies, beside what they took."""
    lines = []
    for run in map(read, sorted((folder / "distributed").glob("*.json"))):
        own = dataclasses.replace(machine, copy=run["ceilings"]["copy_gbps"])
        steps = [row for row in run["rows"] if row["op"] == "step" and not row["error"]]
        lines += [_beside(row, own, run["device"]) for row in steps if row["implementation"] == "tilestack"]
    return ["", "The model beside what was measured:", "", *lines] if lines else []


def _beside(row: dict, machine: Machine, device: str) -> str:
    case = row["case"]
    training = training_of(case_of_step(case))
    layout = dataclasses.replace(training, update_bytes=update_bytes(training))
    said = step_time(qwen3_30b_a3b(case["layers"]), layout, machine)
    what = f"{case['layers']} layers, {case['batch']} x {case['seqlen']:,}, "
    what += f"one {device}" if case["gpus"] == 1 else f"{case['gpus']} x {device}, {split_of(case)}"
    what += "" if case["checkpointing"] == "none" else f", {case['checkpointing']} checkpointing"
    return (
        f"- {what}: {said.total:.0f} ms by the model, {said.communication:.0f} of them communication that nothing "
        f"hides; {row['ms_median']:.0f} and {row['exposed_ms']:.0f} ms measured."
    )


def _cell(layout: Layout, machine: Machine) -> str:
    time = step_time(FULL, layout, machine)
    return f"{tflops(FULL, layout, time):.0f} ({time.communication / time.total:.0%})"


def measured(folder: Path = FOLDER) -> Machine:
    """H100 with the rates of the result files in place of the rounded ones; its links are as they are."""
    attention = read(folder / "attention" / "1xH100.json")
    moe = read(folder / "moe" / "1xH100.json")
    return dataclasses.replace(
        H100,
        attention=_attention(attention["rows"]),
        experts=_experts(moe["rows"]),
        copy=attention["ceilings"]["copy_gbps"],
        node_link=_link(folder / "distributed"),
        **_of_the_trace(read(folder / "trace" / "1xH100.json")),
    )


def _attention(rows: list[dict]) -> dict[int, tuple[float, float]]:
    """Of the model's own heads, causal, in dense batches of 16,384 tokens."""
    found: dict[int, dict[str, float]] = {}
    for row in rows:
        case = row["case"]
        own = (case["heads"], case["kv_heads"], case["head_dim"]) == (32, 4, 128) and case["layout"] == "dense"
        plain = case["causal"] and case["window"] == [-1, -1] and not case["deterministic"]
        if own and plain and row["implementation"] == "tilestack" and row["tflops"]:
            found.setdefault(case["seqlen"], {})[row["direction"]] = row["tflops"]
    return {
        length: (each["forward"], each["backward"])
        for length, each in found.items()
        if {"forward", "backward"} <= {*each}
    }


def _experts(rows: list[dict]) -> dict[int, tuple[float, float]]:
    found: dict[int, dict[str, float]] = {}
    for row in rows:
        case = row["case"]
        if row["implementation"] == "tilestack" and case["routing"] == "random" and row["tflops"]:
            found.setdefault(case["tokens"] * case["top_k"] // case["experts"], {})[row["direction"]] = row["tflops"]
    return {count: (each["forward"], each["both"]) for count, each in found.items() if {"forward", "both"} <= {*each}}


def _link(folder: Path) -> float:
    """What a GPU receives from another in a collective: the mean over its kinds; the rounded one without a file."""
    rows = [row for path in sorted(folder.glob("*.json")) for row in read(path)["rows"] if row["op"] == "link"]
    return statistics.mean(row["gbps"] for row in rows) if rows else H100.node_link


def _of_the_trace(run: dict) -> dict[str, float]:
    """Rates of the parts that no bench times alone, from the recorded step."""
    model, ours = run["configuration"]["model"], run["rows"][0]
    tokens = run["configuration"]["data"]["micro_batch_tokens"]
    milliseconds = {part["part"]: part["ms"] for part in ours["parts"]}
    config = qwen3_30b_a3b(model["layers"])
    without_layers = qwen3_30b_a3b(0)
    projected = 6 * model["layers"] * 2048 * 128 * (2 * 32 + 2 * 4)
    glue = sum(milliseconds[part] for part in GLUE)
    return {
        "projections": projected * tokens / milliseconds["attention projections"] / 1e9,
        "head": training_flops_per_token(without_layers, 0) * tokens / milliseconds["LM head and losses"] / 1e9,
        "glue_ns": glue * 1e6 / tokens / config.num_hidden_layers,
    }
