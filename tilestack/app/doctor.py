"""`tilestack doctor`: is this machine ready to train, what will be slower than it could be, and what to do about it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from packaging.requirements import Requirement
from packaging.version import Version
from rich import box
from rich.console import Console
from rich.table import Table

from tilestack.app.config import OutputConfig
from tilestack.app.errors import UserError
from tilestack.distributed import LaunchError
from tilestack.distributed.launch import check_deepspeed
from tilestack.kernels import ops, rms_norm
from tilestack.kernels.device import Device
from tilestack.kernels.dispatch import Implementation

FINE, NOTE, BROKEN = "ok", "note", "broken"
MARKS = {FINE: "[green]ok[/]", NOTE: "[yellow]note[/]", BROKEN: "[bold red]broken[/]"}
LEAST_DISK_GIB = 5
OPTIONAL = {
    "tensorboard": "output.trackers: [tensorboard]",
    "wandb": "output.trackers: [wandb]",
    "trackio": "output.trackers: [trackio]",
}


@dataclass(frozen=True)
class Finding:
    """One line of the table. state: FINE, NOTE (it trains, but read this) or BROKEN. do: what to do, "" for nothing."""

    state: str
    what: str
    found: str
    do: str = ""


def main(argv: list[str]) -> int:
    """The command line; returns the exit code. Raises UserError for options, of which there are none."""
    if argv:
        raise UserError(f"tilestack doctor takes no options, got {argv[0]!r}")
    findings = list(examine())
    show(findings, Console(highlight=False))
    return int(any(finding.state == BROKEN for finding in findings))


def examine() -> Iterator[Finding]:
    """Every finding, in the order of the table."""
    yield Finding(FINE, "Python", f"{platform.python_version()}, {platform.system()} {platform.machine()}")
    yield from packages(importlib.metadata.requires, importlib.metadata.version)
    device = Device.current()
    yield gpu(device)
    yield from launcher(device)
    yield first_kernel(device)
    yield deepspeed()
    yield from room()
    yield optional()


def packages(requires: Callable[[str], list[str] | None], version: Callable[[str], str]) -> Iterator[Finding]:
    """tilestack's own requirements, those of training included, against what is installed."""
    try:
        lines = requires("tilestack") or []
    except importlib.metadata.PackageNotFoundError:
        yield Finding(NOTE, "tilestack", "not installed, run from its sources", "pip install -e '.[train]'")
        return
    for requirement in map(Requirement, lines):
        if requirement.marker and not requirement.marker.evaluate({"extra": "train"}):
            continue
        name, bounds = requirement.name, requirement.specifier
        wanted = ",".join(sorted(map(str, bounds), reverse=True))  # >= before <
        try:
            have = version(name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding(BROKEN, name, "not installed", f"pip install '{name}{wanted}'")
            continue
        if bounds.contains(Version(have), prereleases=True):
            yield Finding(FINE, name, f"{have} ({wanted})")
        else:
            yield Finding(BROKEN, name, f"{have}, which is not {wanted}", f"pip install '{name}{wanted}'")


def gpu(device: Device) -> Finding:
    """The GPU, and whose kernels it gets."""
    if device.type == "cpu":
        built = torch.version.cuda or torch.version.hip
        do = "" if built else "with a GPU: install a torch that is built for it; this one is for CPUs alone"
        return Finding(NOTE, "GPU", "none: training runs on the CPU, each op as its reference in plain PyTorch", do)
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30
    count = torch.cuda.device_count()
    found = f"{count} x {device.name}, {memory:.0f} GiB, {device.arch}; kernels written for it: "
    special = [op for op, each in ops().items() if any(_made_for(device, one) for one in each.implementations)]
    if special:
        return Finding(FINE, "GPU", f"{found}{', '.join(special)}; the rest is portable Triton")
    return Finding(NOTE, "GPU", f"{found}none, all ops run as portable Triton", "see tilestack explain for every op")


def _made_for(device: Device, implementation: Implementation) -> bool:
    ours = implementation.name == "tilestack"
    return ours and implementation.min_capability is not None and implementation.refuses_machine(device) is None


def launcher(device: Device) -> Iterator[Finding]:
    """Triton compiles a small launcher in C for each kernel at its first use."""
    if device.type == "cpu":
        return
    compiler = os.environ.get("CC") or next(filter(shutil.which, ("cc", "gcc", "clang")), None)
    if compiler is None or shutil.which(compiler) is None:
        do = "Debian, Ubuntu: apt install gcc; Fedora: dnf install gcc; or set CC"
        yield Finding(BROKEN, "C compiler", "none; Triton's launchers need one", do)
    else:
        yield Finding(FINE, "C compiler", compiler)
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    if headers.exists():
        yield Finding(FINE, "Python's headers", str(headers.parent))
    else:
        do = "Debian, Ubuntu: apt install python3-dev; Fedora: dnf install python3-devel"
        yield Finding(BROKEN, "Python's headers", f"{headers} is missing; Triton's launchers need it", do)


def first_kernel(device: Device) -> Finding:
    """One op on this machine, compiled if it has to be, against its reference."""
    place = torch.device(device.type)
    x, weight = torch.randn(64, 256, device=place), torch.ones(256, device=place)
    try:
        ours, truth = rms_norm(x, weight), rms_norm(x, weight, implementation="reference")
        right = torch.allclose(ours, truth, rtol=1e-4, atol=1e-4)
    except Exception as error:  # whatever a compiler or a driver raises is the finding
        return Finding(BROKEN, "first kernel", f"{type(error).__name__}: {str(error)[:200]}", "see the lines above")
    if not right:
        return Finding(BROKEN, "first kernel", "rms_norm gives wrong numbers", "please report it, with this table")
    return Finding(FINE, "first kernel", "rms_norm ran and is right")


def deepspeed() -> Finding:
    """DeepSpeed, which several processes need."""
    try:
        check_deepspeed()
    except LaunchError as error:
        found, _, do = str(error).partition("; ")
        return Finding(NOTE, "several processes", found, do)
    return Finding(FINE, "several processes", "DeepSpeed is installed")


def room() -> Iterator[Finding]:
    """Memory of the host, and the disks that a run and Triton's cache write to."""
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    yield Finding(FINE, "host", f"{os.cpu_count()} cores, {pages:.0f} GiB of memory")
    cache = Path(os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton")
    for what, folder in (("disk of runs", Path(OutputConfig().folder)), ("disk of Triton's cache", cache)):
        yield disk(what, folder)


def disk(what: str, folder: Path) -> Finding:
    """The free space where a folder is or would be made."""
    parent = next(each for each in (folder.absolute(), *folder.absolute().parents) if each.exists())
    if not os.access(parent, os.W_OK):
        return Finding(BROKEN, what, f"{parent} cannot be written to", "--output.folder names another place")
    free = shutil.disk_usage(parent).free / 2**30
    if free < LEAST_DISK_GIB:
        return Finding(NOTE, what, f"{free:.1f} GiB free in {parent}", "a checkpoint takes 14 bytes a parameter")
    return Finding(FINE, what, f"{free:.0f} GiB free in {parent}")


def optional() -> Finding:
    """Packages that nothing needs, and what they would bring."""
    there = [name for name in OPTIONAL if importlib.util.find_spec(name)]
    vendors = {
        package
        for op in ops().values()
        for each in op.implementations
        for package in each.packages
        if package != "triton"
    }
    there += [name for name in sorted(vendors) if importlib.util.find_spec(name.split(".")[0])]
    return Finding(FINE, "optional packages", ", ".join(there) or "none; none is needed")


def show(findings: list[Finding], console: Console) -> None:
    """Print the table and its upshot."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), show_edge=False)
    for name in ("", "what", "found", "what to do"):
        table.add_column(name, overflow="fold")
    for each in findings:
        table.add_row(MARKS[each.state], each.what, each.found, each.do)
    console.print(table)
    broken = [each.what for each in findings if each.state == BROKEN]
    if broken:
        console.print(f"\n[bold red]Mend first:[/] {', '.join(broken)}")
    else:
        console.print("\nA training can start here: [bold]tilestack train[/], or [bold]tilestack explain[/] first.")
