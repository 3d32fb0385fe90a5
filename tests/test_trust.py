"""The record of what passed on a GPU: counts are of what ran; what was stopped did not pass."""

import json
import subprocess
import sys
import time
from dataclasses import asdict

import pytest

from tilestack.bench import trust
from tilestack.bench.results import ROOT, read
from tilestack.testing import sanitized

GRID = "tests/kernels/test_grid.py::test_outputs_and_gradients_are_within_twice_the_error_of_eager[{}]"


def line(test, outcome="passed", message=""):
    return {"test": test, "outcome": outcome, "seconds": 0.1, "message": message}


def test_tests_are_counted_by_check_and_the_grid_by_implementation():
    lines = [
        line(GRID.format("moe-tilestack-plain-bfloat16")),
        line(GRID.format("moe-tilestack-wide-bfloat16"), "failed", "where\nE  dx: too far off"),
        line(GRID.format("moe-tilestack-plain-float32"), "skipped"),
        line(GRID.format("moe-tilestack-triton-plain-float32"), "not reached"),
        line(GRID.format("attention-cudnn-plain-bfloat16")),  # a vendor's adapter
        line("tests/compat/test_alias.py::test_one[a-b]"),
    ]
    rows = trust.rows_of_tests({name: trust.CHECKS[name] for name in ("moe grid", "flash_attn")}, lines)
    found = {(row.check, row.implementation): trust.words(asdict(row)) for row in rows}
    assert found == {
        ("moe grid", "tilestack"): "1 passed, 1 failed, 1 refused",
        ("moe grid", "tilestack-triton"): "0 passed, 1 not reached",
        ("flash_attn", ""): "1 passed",
    }
    assert rows[0].failures == ["test_outputs_and_gradients_are_within_twice_the_error_of_eager"
                                "[moe-tilestack-wide-bfloat16]: dx: too far off"]  # fmt: skip


def test_random_calls_that_failed_are_not_counted_as_passed():
    found = {"first": 0, "cases": 10, "calls": {"tilestack": 4, "tilestack-triton": 8}, "refused": {"tilestack": 4}}
    found |= {"failures": ["seed 3, tilestack: dq: too far off"], "not_reached": 2}
    rows = {row.implementation: trust.words(asdict(row)) for row in trust.CHECKS["attention random"].rows("", found)}
    assert rows["tilestack"] == "3 passed, 1 failed, 4 refused, 2 not reached"
    assert rows["tilestack-triton"] == "8 passed, 2 not reached"


ALL = "".join(
    f"ran router, {implementation}: {case.name} (1.0 s)\n" for implementation, case in sanitized.calls("router")
)
REPORT = "========= Invalid __global__ read of size 16 bytes\n=========     at kernel+0x10\n"


COUNT = len(sanitized.calls("router"))
FIRST = ALL.splitlines(keepends=True)[0]
DIED = "RuntimeError: CUDA error: an illegal memory access was encountered\n"


@pytest.mark.parametrize(
    ("log", "code", "passed", "failed"),
    [
        (ALL + "========= ERROR SUMMARY: 0 errors\n", 0, COUNT, 0),
        (ALL + REPORT + "========= ERROR SUMMARY: 1 error\n", 0, 0, COUNT),
        (ALL + "========= Misaligned Shared or Local Address\n========= ERROR SUMMARY: 3 errors\n", 0, 0, COUNT),
        (ALL + "========= Words of a later tool\n========= ERROR SUMMARY: 3 errors\n", 0, 0, COUNT),
        (ALL + "========= Error: Race reported between Read access at k+0x10 in k.py:3\n", 0, 0, COUNT),
        (FIRST, None, 1, 0),
        (FIRST + DIED + "========= ERROR SUMMARY: 0 errors\n", 1, 1, 1),
        (FIRST + REPORT + DIED + "========= ERROR SUMMARY: 1 error\n", 1, 0, 2),
        (FIRST, -11, 1, 1),
        (ALL, 1, COUNT - 1, 1),
        ("========= Error: Device not supported\n", 1, 0, 1),
    ],
    ids=[
        "clean", "an error", "misaligned", "unknown words", "a race", "stopped", "died", "an error and died",
        "died without a word", "died at its end", "no device",
    ],
)  # fmt: skip
def test_what_a_sanitizer_did_not_come_to_or_found_wrong_is_not_counted_as_passed(log, code, passed, failed):
    row = trust.CHECKS["memcheck"].row("memcheck", "router", log, code)
    assert (row.passed, row.failed) == (passed, failed)
    assert row.passed + row.failed + row.not_reached == COUNT
    assert bool(row.failures) == bool(failed)
    assert ("stopped" in row.what) == (code in (0, None) and "SUMMARY" not in log)
    assert DIED not in log or DIED.strip() in row.failures[0]


def test_the_exit_code_of_a_process_is_known_unless_a_limit_stopped_it():
    for script, code in (("import sys; sys.exit(3)", 3), ("import time; time.sleep(60)", None)):
        process = subprocess.Popen([sys.executable, "-c", script], start_new_session=True)
        assert trust.Budget.wait(process, time.monotonic() + (2 if code is None else 60)) == code


def race(first, second):
    lines = [f"Error: Race reported between Read access at {first}", f"    and Write access at {second} [4 hazards]"]
    return ALL + "".join(f"========= {line}\n" for line in lines)


def test_races_in_what_triton_adds_to_a_kernel_are_said_but_not_counted():
    file = ROOT / "tilestack/kernels/attention/sm90_forward.py"
    lines = file.read_text().splitlines()
    signature = next(n for n, text in enumerate(lines, 1) if text.startswith("def attention_forward_kernel("))
    start = next(n for n, text in enumerate(lines, 1) if text.strip() == "gl.warp_specialize([")
    places = [f"attention_forward_kernel+0x150 in {file.name}:{line}" for line in (signature, start, signature - 50)]
    excused = race(*places[:2]) + "========= RACECHECK SUMMARY: {} hazards displayed (1 error, 0 warnings)\n"
    row = trust.CHECKS["racecheck"].row("racecheck", "router", excused.format(1), 0)
    assert row.passed == len(sanitized.calls("router")) and not row.failures and "partitions" in row.what
    row = trust.CHECKS["racecheck"].row("racecheck", "router", excused.format(2), 0)  # one more than is excused
    assert row.failed == len(sanitized.calls("router")) and "SUMMARY: 2 hazards" in row.failures[0]
    row = trust.CHECKS["racecheck"].row("racecheck", "router", race(places[0], places[2]), 0)
    assert row.failed == len(sanitized.calls("router")) and len(row.failures) == 1


def test_a_run_replaces_the_rows_of_its_checks_unless_it_came_less_far(tmp_path):
    path = tmp_path / "trust" / "1xH100.json"
    record = {"bench": "trust", "device": "a GPU", "versions": {"torch": "2", "triton": "3"}}

    def put(check, op, commit, passed, failed=0):
        row = asdict(trust.Row(check, op, "", "what", passed, failed)) | {"commit": commit, "date": "2026-11-25T20:00"}
        trust.put(record | {"rows": [row]}, path)

    put("moe calls", "moe", "aaaaaaaaa", 1)
    put("model", "model", "bbbbbbbbb", 2)
    put("moe calls", "moe", "ccccccccc", 3)
    put("moe calls", "moe", "ddddddddd", 2)
    assert [(row["check"], row["commit"][:1], row["passed"]) for row in read(path)["rows"]] == [
        ("moe calls", "c", 3),
        ("model", "b", 2),
    ]
    assert "| what | all | 3 passed | ccccccc, 2026-11-25 |" in trust.block(read(path), "moe")
    assert trust.block(read(path), "router") == "Not run yet.\n"
    put("moe calls", "moe", "eeeeeeeee", 1, failed=1)  # but what it found wrong is kept
    assert read(path)["rows"][0]["commit"] == "eeeeeeeee"


def test_the_files_and_cases_that_checks_name_are_there():
    for check in trust.CHECKS.values():
        for file in getattr(check, "files", ()):
            assert (ROOT / file).exists(), file
    for op, wanted in sanitized.CALLS.items():
        assert len(sanitized.calls(op)) == sum(map(len, wanted.values())), f"a case of {op} has another name by now"


def test_tests_are_recorded_also_those_that_a_limit_leaves_out(tmp_path):
    file, record = tmp_path / "test_some.py", tmp_path / "record.jsonl"
    file.write_text(
        "import pytest, time\ndef test_a(): time.sleep(0.3)\ndef test_b(): assert 1 == 2\ndef test_c(): pass\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tilestack.testing.record", "--record", str(record)]
    outcomes = []
    for more in (["--only", "test_[ab]"], ["--seconds", "0.2"]):
        subprocess.run([*command, *more, str(file)], cwd=tmp_path, capture_output=True, check=False)
        lines = [json.loads(each) for each in record.read_text().splitlines()]
        entered = len({each["test"] for each in lines})
        assert {each["outcome"] for each in lines[:entered]} == {"not reached"}
        outcomes.append({each["test"][-1]: each["outcome"] for each in lines})
    assert outcomes[0] == {"a": "passed", "b": "failed"}
    assert outcomes[1] == {"a": "passed", "b": "not reached", "c": "not reached"}


def test_a_check_that_does_not_end_is_stopped_with_all_that_it_started(tmp_path):
    script = tmp_path / "slow.py"
    script.write_text("import subprocess, sys, time\nsubprocess.Popen(['sleep', '60'])\ntime.sleep(60)\n")
    started = time.monotonic()
    trust.Budget(seconds=0.5, workers=1, grace=0.5).run([str(script)])
    assert time.monotonic() - started < 30
