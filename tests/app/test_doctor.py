"""`tilestack doctor`: it finds what is missing, says what to do, and lets what is fine pass."""

import importlib.metadata

import pytest
from rich.console import Console

from tilestack.app import doctor
from tilestack.app.cli import main
from tilestack.app.doctor import BROKEN, FINE, NOTE, Finding
from tilestack.app.explain import named_device

HOPPER, CPU = named_device("sm_90"), named_device("cpu")


def test_this_machine_which_runs_the_tests_can_train(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert "rms_norm ran and is right" in printed and "A training can start here" in printed


def missing(name):
    raise importlib.metadata.PackageNotFoundError(name)


@pytest.mark.parametrize(
    ("installed", "state", "do"),
    [
        (lambda name: "2.11.0+cu130", FINE, ""),
        (lambda name: "2.12.0.dev1", FINE, ""),
        (lambda name: "2.9.1", BROKEN, "pip install 'torch>=2.11,<2.15'"),
        (lambda name: "2.15.0", BROKEN, "pip install 'torch>=2.11,<2.15'"),
        (missing, BROKEN, "pip install 'torch>=2.11,<2.15'"),
    ],
)
def test_a_package_is_held_against_what_tilestack_asks_for(installed, state, do):
    (found,) = doctor.packages(lambda name: ["torch>=2.11,<2.15", "ruff==1; extra == 'dev'"], installed)
    assert (found.state, found.what, found.do) == (state, "torch", do)


def test_sources_that_were_not_installed_are_no_obstacle():
    (found,) = doctor.packages(missing, missing)
    assert found.state == NOTE and "pip install -e" in found.do


def test_on_a_gpu_a_missing_c_compiler_and_missing_headers_are_told(monkeypatch, tmp_path):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(doctor.sysconfig, "get_path", lambda name: str(tmp_path))
    compiler, headers = doctor.launcher(HOPPER)
    assert compiler.state == headers.state == BROKEN
    assert "apt install gcc" in compiler.do and "apt install python3-dev" in headers.do
    assert list(doctor.launcher(CPU)) == []


def test_a_compiler_that_cc_names_and_that_is_not_there_is_told(monkeypatch):
    monkeypatch.setenv("CC", "/nowhere/cc")
    assert next(doctor.launcher(HOPPER)).state == BROKEN


def test_a_kernel_that_raises_or_is_wrong_is_broken(monkeypatch):
    def raises(*args, **options):
        raise RuntimeError("no such ptxas")

    monkeypatch.setattr(doctor, "rms_norm", raises)
    assert "no such ptxas" in doctor.first_kernel(CPU).found
    monkeypatch.setattr(doctor, "rms_norm", lambda x, weight, implementation=None: x + (implementation is None))
    assert doctor.first_kernel(CPU) == Finding(
        BROKEN, "first kernel", "rms_norm gives wrong numbers", "please report it, with this table"
    )


def test_a_full_disk_and_one_that_cannot_be_written_are_told(monkeypatch, tmp_path):
    assert doctor.disk("disk", tmp_path / "not" / "yet").state == FINE
    monkeypatch.setattr(doctor, "LEAST_DISK_GIB", 2**40)
    assert doctor.disk("disk", tmp_path).state == NOTE
    monkeypatch.setattr(doctor.os, "access", lambda path, mode: False)
    assert doctor.disk("disk", tmp_path).state == BROKEN


def test_what_is_broken_comes_last_once_more_and_the_exit_code_says_it(monkeypatch):
    findings = [Finding(FINE, "torch", "2.13"), Finding(BROKEN, "triton", "[not] installed", "pip install triton")]
    console = Console(record=True, width=100)
    doctor.show(findings, console)
    assert "Mend first: triton" in console.export_text()
    monkeypatch.setattr(doctor, "examine", lambda: iter(findings))
    assert doctor.main([]) == 1


def test_it_has_help_and_no_options(capsys):
    assert main(["doctor", "--help"]) == 0
    assert "Changes nothing" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["doctor", "--fix"])
    assert "takes no options, got '--fix'" in capsys.readouterr().err
