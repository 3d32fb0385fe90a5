"""The tables of what training holds of memory, and of what an update costs."""

from __future__ import annotations

from tilestack.bench.memory import MemoryCase, predicted, training_of
from tilestack.bench.step import qwen3_30b_a3b
from tilestack.distributed.memory_model import GIB, host_bytes

GPUS = {"H100": 79.2, "H200": 139.8}  # GiB
WHOLE = (  # the full model on four GPUs: on which, and how
    ("H200", {}), ("H200", {"moments": "bfloat16"}), ("H200", {"moments": "8bit"}),
    ("H100", {"moments": "8bit", "master_weights": False}), ("H100", {"offload": True}), ("H100", {}),
)  # fmt: skip


def plan_block(run: dict) -> str:
    """Measured beside planned, a line a configuration."""
    lines = [
        "| layers | spread | micro-batches | recomputed | state | measured | planned | | of the GPU | planned |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [_plan_line(MemoryCase(**row["case"]), row) for row in run["rows"]]
    return "\n".join(lines) + "\n"


def _plan_line(case: MemoryCase, row: dict) -> str:
    head = _head(case)
    if row["error"]:
        return head + f"{row['error'].splitlines()[0][:60]} | | | | |"
    planned, outside = predicted(case), row["gib"].get("outside")  # not known where others used the GPU meanwhile
    used = "" if outside is None else f"{row['gib']['reserved'] + outside:.1f}"
    allocated = planned.allocated / GIB
    return (
        f"{head}{row['peak_gib']:.1f} | {allocated:.1f} | {allocated / row['peak_gib'] - 1:+.1%} | {used} | "
        f"{planned.total / GIB:.1f} |"
    )


def _head(case: MemoryCase) -> str:
    return (
        f"| {case.layers} | {spread(case)} | {case.accumulation} x {case.micro_batch_tokens:,} | {_recomputed(case)} | "
        f"{_state(case)} | "
    )


def case_of_step(case: dict) -> MemoryCase:
    """What `tilestack bench distributed` timed, as a case: one process has no DeepSpeed."""
    same = ("layers", "gpus", "expert_parallel", "sequence_parallel", "seqlen", "checkpointing")
    same += tuple(name for name in ("moments", "master_weights", "offload") if name in case)
    zero = case["zero"] if case["gpus"] > 1 else None
    return MemoryCase(
        zero=zero, micro_batch_tokens=case["batch"] * case["seqlen"], **{name: case[name] for name in same}
    )


def steps_with_peaks(run: dict) -> list[tuple[MemoryCase, float]]:
    """(case, the GiB that its step allocated at the most) of our own steps among the rows of a run."""
    ours = [row for row in run["rows"] if row["op"] == "step" and row["implementation"] == "tilestack"]
    return [(case_of_step(row["case"]), row["peak_gib"]) for row in ours if row["peak_gib"] and not row["error"]]


def timed_block(run: dict) -> str:
    """Measured beside planned for the steps of another bench, a line each."""
    lines = [
        "| layers | spread | micro-batches | recomputed | state | measured | planned | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case, peak in steps_with_peaks(run):
        allocated = predicted(case).allocated / GIB
        lines.append(f"{_head(case)}{peak:.1f} | {allocated:.1f} | {allocated / peak - 1:+.1%} |")
    return "\n".join(lines) + "\n"


def planned_table() -> str:
    """What the full model needs of four GPUs: predicted, of no result file."""
    lines = ["| 4 GPUs | spread | recomputed | state | GiB needed | left | on the host, for each |"]
    lines.append("|---|---|---|---|---|---|---|")
    for gpu, kept in WHOLE:
        for layout in ({"zero": 2, "expert_parallel": 4}, {"zero": 3}):
            case = MemoryCase(48, gpus=4, checkpointing="full", **layout, **kept)
            total = predicted(case).total / GIB
            host = host_bytes(qwen3_30b_a3b(48), training_of(case)) / GIB
            left = f"{GPUS[gpu] - total:.1f}" if total <= GPUS[gpu] else "does not fit"
            lines.append(
                f"| {gpu} | {spread(case)} | full | {_state(case)} | {total:.1f} of {GPUS[gpu]} | {left} | {host:.0f} |"
            )
    return "\n".join(lines) + "\n"


def spread(case: MemoryCase) -> str:
    """How many GPUs, and how they share."""
    if case.zero is None:
        return "1 GPU"
    parts = [f"{case.gpus} GPUs, ZeRO {case.zero}"]
    parts += [f"EP {case.expert_parallel}"] if case.expert_parallel > 1 else []
    parts += [f"SP {case.sequence_parallel}"] if case.sequence_parallel > 1 else []
    return ", ".join(parts)


def _recomputed(case: MemoryCase) -> str:
    return case.checkpointing + (", inputs on host" if case.activation_offload else "")


def _state(case: MemoryCase) -> str:
    if case.offload:
        return f"{case.moments}, on host"
    return case.moments + ("" if case.master_weights else ", no master")


def adamw_block(run: dict) -> str:
    """Time, traffic and rate of an update, a line a state."""
    lines = ["| state | who | bytes a parameter | ms | GB/s | of a copy |", "|---|---|---|---|---|---|"]
    for row in run["rows"]:
        case, share = row["case"], row["gbps"] / run["ceilings"]["copy_gbps"]
        lines.append(
            f"| {case['state']} | {row['implementation']} | {case['bytes'] / case['parameters']:.1f} | "
            f"{row['ms_median']:.3f} | {row['gbps']:.0f} | {share:.0%} |"
        )
    return "\n".join(lines) + "\n"
