"""A plan and proposals on a terminal."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tilestack.app.plan.proposals import Plan
from tilestack.distributed.memory_model import GIB, SLACK, Training


def show_plan(head: dict[str, Any], found: list[Plan], console: Console) -> None:
    """One configuration: every part at the highest moment, the other moments' sums, and the time."""
    (each,) = found
    _title(head, console)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), show_edge=False)
    table.add_column("held on each GPU")
    table.add_column("GiB", justify="right")
    memory = each.memory
    for part, size in memory.parts.items():
        table.add_row(part, gib(size))
    table.add_section()
    table.add_row(f"allocated at the highest moment ({memory.highest})", gib(memory.allocated))
    table.add_row(f"slack of the allocator, {SLACK:.0%}", gib(SLACK * memory.allocated))
    table.add_row("CUDA, cuBLAS, NCCL: outside of the allocator", gib(memory.outside))
    table.add_row(f"[bold]needed of {gib(each.gpu_bytes)}[/]", f"[bold]{gib(memory.total)}[/]")
    console.print(table)
    others = ", ".join(
        f"{moment} {gib(sum(parts.values()))}" for moment, parts in memory.moments.items() if moment != memory.highest
    )
    console.print(f"other moments, allocated: {others} GiB", style="dim")
    if each.host_bytes:
        console.print(f"of the host's memory for each GPU: {gib(each.host_bytes)} GiB")
    verdict = f"[green]fits[/], {gib(each.room)} GiB are left" if each.room >= 0 else (
        f"[bold red]does not fit[/]: {gib(-each.room)} GiB are missing"
    )  # fmt: skip
    console.print(f"\n[bold]It {verdict}[/]")
    _show_time(each, console)


def _show_time(each: Plan, console: Console) -> None:
    t, time = each.training, each.time
    tokens = t.micro_batch_tokens * t.accumulation * t.gpus // t.sequence_parallel
    console.print(
        f"a step of {tokens:,} tokens takes about {time.total:,.0f} ms: {each.tokens_per_second:,.0f} tokens/s and "
        f"{each.tflops:.0f} TFLOP/s a GPU (communication that nothing hides {time.communication:,.0f} ms, "
        f"recomputation {time.recomputed:,.0f} ms, update {time.update:,.0f} ms)"
    )


def show_proposals(head: dict[str, Any], found: list[Plan], console: Console) -> None:
    """Configurations that fit, fastest first, and the options of the first."""
    _title(head, console)
    if not found:
        console.print(
            "[bold red]No configuration fits[/]: take more GPUs, larger ones, or shorter documents (--seqlen)"
        )
        return
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for name in ("layout", "batches", "recomputed", "moments", "master"):
        table.add_column(name, no_wrap=True)
    for name in ("GiB", "left", "tokens/s"):
        table.add_column(name, justify="right", no_wrap=True)
    for each in found:
        t = each.training
        table.add_row(
            _layout(t), f"{t.accumulation} x {t.micro_batch_tokens:,}", t.checkpointing, t.moments,
            "on host" if t.offload else "float32" if t.has_master else "none",
            gib(each.memory.total), gib(each.room), f"{each.tokens_per_second:,.0f}",
        )  # fmt: skip
    console.print(table)
    console.print(
        "\nEP, SP: so many ranks share the experts, each row of tokens. batches: micro-batches of each rank. GiB, "
        "left, tokens/s: of each GPU, predicted.\nThe first one, for train.py:"
    )
    options = " ".join(f"--{name} {_written(value)}" for name, value in found[0].options.items())
    console.print(f"  {escape(options)}", soft_wrap=True)


def _layout(training: Training) -> str:
    parts = [f"ZeRO {training.zero}" if training.deepspeed else "one process"]
    if training.expert_parallel > 1:
        parts.append(f"EP {training.expert_parallel}")
    if training.sequence_parallel > 1:
        parts.append(f"SP {training.sequence_parallel}")
    return ", ".join(parts)


def _written(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _title(head: dict[str, Any], console: Console) -> None:
    gpus = f"{head['gpus']} x {head['gpu']} ({gib(head['gpu_bytes'])} GiB)"
    console.print(f"\n[bold]{escape(head['model'])}[/] on {escape(gpus)}\n")


def gib(size: float) -> str:
    """Bytes as GiB."""
    return f"{size / GIB:.1f}"
