"""The installed command."""

import subprocess
import sys

import pytest

from app.tiny_run import only_run, write_config
from tilestack.app import cli, usage
from tilestack.app.cli import main
from tilestack.app.plan.command import GPUS
from tilestack.app.plan.models import SHAPES


def test_tilestack_train_is_train_py(tmp_path, capsys):
    config = write_config(tmp_path, train={"steps": 2, "save_every": 0, "eval_every": 0}, output={"export": False})
    assert main(["train", "--config", str(config)]) == 0
    assert str(only_run(tmp_path) / "loss.png") in capsys.readouterr().out


def test_tilestack_train_reports_wrong_input_like_train_py(capsys):
    with pytest.raises(SystemExit) as leaving:
        main(["train", "--optimizer.lrr", "1"])
    assert leaving.value.code == 2
    assert capsys.readouterr().err.startswith("error: unknown key --optimizer.lrr; did you mean --optimizer.lr?")


def test_tilestack_alone_lists_its_commands_and_an_unknown_one_is_refused(capsys):
    assert main([]) == 0
    said = capsys.readouterr().out
    assert all(command in said for command in ("train", "explain", "bench"))
    with pytest.raises(SystemExit) as leaving:
        main(["trian"])
    assert leaving.value.code == 2
    assert "unknown command 'trian'; did you mean 'train'?" in capsys.readouterr().err


def test_help_and_a_mistyped_command_wait_for_no_heavy_package():
    commands = ["--help", "trian", *(f"{name} --help" for name in usage.COMMANDS)]
    program = f"""
import sys
from tilestack.app.cli import main
for command in {commands!r}:
    try:
        main(command.split())
    except SystemExit:
        pass
print(*sorted(set(sys.modules) & {{"torch", "transformers", "rich", "jsonargparse"}}), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == "" and done.stdout.count("usage: tilestack") == len(usage.COMMANDS) + 1


def test_the_help_of_plan_names_every_model_and_gpu_that_it_knows():
    assert all(f"{name}," in usage.PLAN for name in SHAPES) and ", ".join(GPUS) in usage.PLAN


def test_a_package_that_is_missing_or_too_old_is_named_and_a_fault_of_our_own_keeps_its_traceback(monkeypatch, capsys):
    def failing(name):
        def load(module):
            raise ImportError("cannot import name 'x' from 'it'", name=name)

        return load

    monkeypatch.setattr(cli.importlib, "import_module", failing("transformers.utils"))
    with pytest.raises(SystemExit):
        main(["doctor"])
    assert "error: tilestack doctor cannot start: cannot import name 'x'" in capsys.readouterr().err
    monkeypatch.setattr(cli.importlib, "import_module", failing("tilestack.app"))
    with pytest.raises(ImportError):
        main(["doctor"])
