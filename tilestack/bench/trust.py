"""`tilestack bench trust`: what of the checks passed on this GPU, kept in a result file as every figure is.

A check is a set of tests, the random calls of attention, or a tool of compute-sanitizer over a small set of calls. What
a time limit left out is counted as not reached, never as passed. A row of the file is one check of one op, and in the
grid of one implementation. A run replaces the rows of its own checks, unless it came less far, and leaves the others,
which keep their commit and date: all of it together takes longer than a GPU is always there for.
"""

from __future__ import annotations

import ast
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tilestack.bench import results
from tilestack.kernels import ops
from tilestack.testing import random_attention, sanitized

MOST_FAILURES = 20  # of a row, whose messages are kept
GRID = r"test_grid\.py::test_outputs_and_gradients\w*\[{}-(tilestack(?:-triton)?)-"


@dataclass
class Row:
    """The outcome of one check of one op.

    refused: calls that the implementation does not take, which is asserted too, or tests that do not apply here.
    """

    check: str
    op: str
    implementation: str
    what: str
    passed: int = 0
    failed: int = 0
    refused: int = 0
    not_reached: int = 0
    failures: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Budget:
    """seconds: what has not begun by then is left out, None is no limit; workers: processes that share the GPU.

    grace: seconds that what has begun may take to its end.
    """

    seconds: float | None
    workers: int
    grace: float = 30

    def run(self, command: list[str]) -> None:
        """Run a program that takes the limit; one that does not end soon after it is stopped, its record is kept."""
        limit = [] if self.seconds is None else ["--seconds", f"{self.seconds:g}"]
        process = subprocess.Popen([sys.executable, *command, *limit], cwd=results.ROOT, start_new_session=True)
        self.wait(process, None if self.seconds is None else time.monotonic() + self.seconds + self.grace)

    @staticmethod
    def wait(process: subprocess.Popen, end: float | None) -> int | None:
        """Until the process ends, or until `end` of time.monotonic(), when it and all that it started are stopped.

        Returns its exit code, None where it was stopped.
        """
        try:
            return process.wait(None if end is None else max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            return None
        finally:  # also where this process is told to end
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@dataclass(frozen=True)
class Tests:
    """Tests of some files: all, or those whose ids have the pattern, whose group is the implementation."""

    op: str
    what: str
    files: tuple[str, ...]
    grid: str = ""

    @property
    def pattern(self) -> str:
        """What the ids of these tests have, and no others."""
        return self.grid or "|".join(f"^{re.escape(each)}" for each in self.files)


@dataclass(frozen=True)
class Random:
    """tilestack/testing/random_attention.py."""

    cases: int

    def run(self, name: str, budget: Budget, scratch: Path) -> list[Row]:
        """Run it and read its record."""
        record = scratch / "random.json"
        command = ["-m", "tilestack.testing.random_attention", "--cases", str(self.cases)]
        budget.run([*command, "--processes", str(budget.workers), "--record", str(record)])
        nothing = {
            "first": 0,
            "cases": self.cases,
            "calls": {},
            "refused": {},
            "failures": [],
            "not_reached": self.cases,
        }
        return self.rows(name, json.loads(record.read_text()) if record.exists() else nothing)

    def rows(self, name: str, found: dict) -> list[Row]:
        """A failure that names no implementation (a process that ended) counts against each."""
        last = found["first"] + found["cases"] - 1
        what = f"random calls, seeds {found['first']} to {last}, against float64"
        made = []
        for implementation in random_attention.OURS:
            failures = [each for each in found["failures"] if f"{implementation}:" in each or each.startswith("seeds ")]
            calls, refused = (found[key].get(implementation, 0) for key in ("calls", "refused"))
            counts = calls - len(failures), len(failures), refused, found["not_reached"]
            made.append(Row(name, "attention", implementation, what, *counts, failures[:MOST_FAILURES]))
        return made


@dataclass(frozen=True)
class Sanitizer:
    """A tool of compute-sanitizer over the calls of tilestack/testing/sanitized.py, a process for each op."""

    tool: str

    def run(self, name: str, budget: Budget, scratch: Path) -> list[Row]:
        """Run the ops side by side."""
        program = shutil.which("compute-sanitizer")
        if program is None:
            raise SystemExit("tilestack bench trust: compute-sanitizer is not on the PATH; it comes with CUDA")
        # every tensor in memory of its own, so that what reads beyond its end is seen
        environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        running = {}
        for op in sanitized.CALLS:
            command = [program, "--tool", self.tool, "--print-limit", "20"]
            command += [sys.executable, "-u", "-m", "tilestack.testing.sanitized", op]
            with (scratch / f"{self.tool}-{op}.log").open("w") as log:
                running[op] = subprocess.Popen(
                    command, stdout=log, stderr=log, env=environment, cwd=results.ROOT, start_new_session=True
                )
        end = None if budget.seconds is None else time.monotonic() + budget.seconds
        codes = {op: budget.wait(process, end) for op, process in running.items()}
        return [self.row(name, op, (scratch / f"{self.tool}-{op}.log").read_text(), codes[op]) for op in running]

    def row(self, name: str, op: str, log: str, code: int | None) -> Row:
        """The calls that ran, all of them failed where the tool found anything; the others were not reached.

        code: the process's exit code, None where a limit stopped it. Any but 0 fails the call in which it ended.
        """
        calls = len(sanitized.calls(op))
        ran = len(re.findall(r"^ran ", log, re.MULTILINE))
        died = code not in (0, None)
        reached = min(ran + died, calls)  # one that dies after all of them dies in the last
        summary = re.search(r"(?:ERROR|RACECHECK) SUMMARY: (\d+).*", log)
        reports = re.findall(
            r"^={9} ((?:Invalid|Misaligned|Error|Warning|Barrier|Internal|Uninit|Program hit).*(?:\n={9}  .*)*)",
            log,
            re.MULTILINE,
        )
        own = [each for each in reports if not _of_the_compiler(each)]
        excused = len(reports) - len(own)
        if not own and summary and int(summary[1]) > excused:  # reports in words that are not known here
            own = [f"{summary[0]}, of which {excused} are not counted"]
        row = Row(name, op, "", f"calls under compute-sanitizer's {self.tool}", failures=own[:MOST_FAILURES])
        row.failed = reached if own else int(died)
        row.passed, row.not_reached = reached - row.failed, calls - reached
        if died:
            last = [line for line in log.splitlines() if line.strip() and not line.startswith(("=", "ran "))][-1:]
            row.failures.insert(0, ": ".join([f"ended with exit code {code} after {ran} of {calls} calls", *last]))
        if excused:
            row.what += "; not counted: its reports of how Triton starts the partitions of a kernel"
        if summary is None and not died:
            row.what += "; it was stopped before its summary"
        return row


def _of_the_compiler(report: str) -> bool:
    """Whether a race is between what Triton adds to a kernel with partitions, not between what the kernel says.

    The first warps write the number of each other warp's partition to shared memory, and all meet at a hardware barrier
    before and after it is read. racecheck does not take that barrier, whose two sides wait at different instructions,
    for one. These accesses have lines of the kernel itself; what partitions do has lines of their functions.
    """
    places = re.findall(r"in (\w+\.py):(\d+)", report)
    return report.startswith("Error: Race") and bool(places) and all(_in_a_kernel(*each) for each in places)


def _in_a_kernel(file: str, line: str) -> bool:
    """Whether a line is of a function that starts partitions, and not of one that is a partition."""
    for path in (results.ROOT / "tilestack" / "kernels").glob(f"*/{file}"):
        text = path.read_text()
        for each in ast.parse(text).body:
            if isinstance(each, ast.FunctionDef) and each.lineno <= int(line) <= each.end_lineno:
                return "gl.warp_specialize(" in ast.get_source_segment(text, each)
    return False


def _kernel_tests(*names: str) -> tuple[str, ...]:
    return tuple(f"tests/kernels/test_{each}.py" for each in names)


RULE = "against float64, error at most twice eager's"
CHECKS: dict[str, Tests | Random | Sanitizer] = {
    **{f"{op} grid": Tests(op, f"the grid, {RULE}", _kernel_tests("grid"), GRID.format(op)) for op in sorted(ops())},
    "attention bits": Tests(
        "attention", "200 deterministic backward passes give equal bits", _kernel_tests("attention_gpu")
    ),
    "attention calls": Tests(
        "attention",
        "its other tests: strides, features, wrong input",
        _kernel_tests("attention", "attention_backward", "attention_features"),
    ),
    "attention random": Random(1000),
    "moe routings": Tests(
        "moe",
        "500 random routings in ten parts, equal bits 100 times, rows beyond 2^31, CUDA graphs",
        _kernel_tests("moe_gpu"),
    ),
    "moe calls": Tests("moe", "its other tests: transformers' experts, sums, wrong input", _kernel_tests("moe")),
    "cache calls": Tests("attention_kvcache", "its other tests", _kernel_tests("attention_kvcache")),
    "flash_attn": Tests("flash_attn", "flash-attn's interface, torch's, the kernel repository", ("tests/compat/",)),
    **{
        f"{op} calls": Tests(op, "its other tests", _kernel_tests(op))
        for op in ("adamw", "cross_entropy", "layer_norm", "qk_norm_rope", "rms_norm", "rotary", "router", "swiglu")
    },
    "linear_cross_entropy calls": Tests(
        "linear_cross_entropy",
        "its other tests, memory among them",
        _kernel_tests("linear_cross_entropy", "linear_cross_entropy_memory"),
    ),
    "custom ops": Tests("custom ops", "opcheck, torch.compile, equal bits twice", _kernel_tests("custom_ops")),
    "model": Tests("model", "beside transformers, and no wait for the GPU", ("tests/models/test_on_gpu.py",)),
    "memcheck": Sanitizer("memcheck"),
    "racecheck": Sanitizer("racecheck"),
}


def run(names: list[str] | None, budget: Budget, commit: str | None = None, folder: Path = results.FOLDER) -> Path:
    """Run the checks (all, or some); each puts its rows into the result file, whose path is returned."""
    chosen = {name: CHECKS[name] for name in names or CHECKS}
    tests = {name: each for name, each in chosen.items() if isinstance(each, Tests)}
    path = folder / "trust" / f"1x{results.short_device()}.json"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # an exception, so that what was started is stopped too
    with tempfile.TemporaryDirectory() as scratch:
        if tests:
            _put(_run_tests(tests, budget, Path(scratch)), commit, path)
        for name, check in chosen.items():
            if name not in tests:
                _put(check.run(name, budget, Path(scratch)), commit, path)
    return path


def _run_tests(tests: dict[str, Tests], budget: Budget, scratch: Path) -> list[Row]:
    """One run of pytest for all of them: every process of it needs some seconds to find its tests."""
    record = scratch / "tests.jsonl"
    record.touch()  # stays empty where the run is stopped before it has found its tests
    files = dict.fromkeys(each for check in tests.values() for each in check.files)
    command = ["-m", "pytest", "-p", "tilestack.testing.record", "--record", str(record)]
    command += ["--only", "|".join(each.pattern for each in tests.values())]
    budget.run([*command, "-p", "no:cacheprovider", "-n", str(budget.workers), "--maxschedchunk=4", *files])
    return rows_of_tests(tests, [json.loads(line) for line in record.read_text().splitlines()])


def rows_of_tests(tests: dict[str, Tests], lines: Iterable[dict]) -> list[Row]:
    """Lines of tilestack/testing/record.py, counted by check, op and implementation."""
    found: dict[tuple, Row] = {}
    for line in {line["test"]: line for line in lines}.values():  # the last of a test is its outcome
        for name, check in tests.items():
            match = re.search(check.pattern, line["test"])
            if match is None:
                continue
            implementation = match.group(1) if check.grid else ""
            row = found.setdefault((name, implementation), Row(name, check.op, implementation, check.what))
            outcome = {"skipped": "refused", "not reached": "not_reached"}.get(line["outcome"], line["outcome"])
            setattr(row, outcome, getattr(row, outcome) + 1)
            if outcome == "failed" and len(row.failures) < MOST_FAILURES:
                row.failures.append(f"{line['test'].split('::')[-1]}: {_reason(line['message'])}")
    return list(found.values())


def _reason(message: str) -> str:
    """The line of pytest's report that says what was wrong."""
    lines = message.splitlines()
    return next((line[1:].strip() for line in lines if line.startswith("E  ")), lines[-1])[:120]


def _put(found: list[Row], commit: str | None, path: Path) -> None:
    """Print the rows and put them into the result file, with what they were run with."""
    record = results.record("trust", [], {})
    record["commit"] = commit or record["commit"]
    record["rows"] = [asdict(row) | {"commit": record["commit"], "date": record["date"]} for row in found]
    for row in record["rows"]:
        print(f"{row['check']}, {row['op']} {row['implementation']}: {words(row)}", *row["failures"], sep="\n  ")
    put(record, path)


def put(record: dict, path: Path) -> Path:
    """Put the rows of a run into a result file, over those of the same check, op and implementation.

    A row of a run that was stopped earlier than the one before, and found nothing wrong, does not replace that one's.
    """

    def key(row: dict) -> tuple[str, str, str]:
        return row["check"], row["op"], row["implementation"]

    order = list(CHECKS)
    rows = {key(row): row for row in (results.read(path)["rows"] if path.exists() else []) if row["check"] in order}
    for row in record["rows"]:
        before = rows.get(key(row))
        if before is None or row["failed"] or row["passed"] >= before["passed"]:
            rows[key(row)] = row
    rows = sorted(rows.values(), key=lambda row: (order.index(row["check"]), row["implementation"]))
    return results.save(record | {"rows": rows}, path)


def merge(files: list[Path], folder: Path = results.FOLDER) -> list[Path]:
    """Put the rows of other result files into those of their machines, a later file's over an earlier one's."""
    return [put(results.read(each), folder / "trust" / each.name) for each in files]


def words(row: dict) -> str:
    """The counts of a row."""
    counts = (("passed", "passed"), ("failed", "failed"), ("refused", "refused"), ("not_reached", "not reached"))
    return ", ".join(f"{row[key]} {name}" for key, name in counts if row[key] or key == "passed")


def block(run: dict, op: str | None = None) -> str:
    """The table of a result file, of one op or of all."""
    rows = [row for row in run["rows"] if op in (None, row["op"])]
    if not rows:
        return "Not run yet.\n"
    versions = f"torch {run['versions']['torch']}, triton {run['versions']['triton']}"
    lines = [f"{run['device']}, {versions}.", "", "| what | of | outcome | commit, day |", "|---|---|---|---|"]
    for row in rows:
        of = " ".join(filter(None, ("" if op else row["op"], row["implementation"]))) or "all"
        lines.append(f"| {row['what']} | {of} | {words(row)} | {row['commit'][:7]}, {row['date'][:10]} |")
    failed = dict.fromkeys(f"- {' '.join(each.split())[:300]}" for row in rows for each in row["failures"])
    return "\n".join([*lines, *(["", "What failed:", "", *failed] if failed else [])]) + "\n"
