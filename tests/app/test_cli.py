"""The installed command."""

import pytest

from app.tiny_run import only_run, write_config
from tilestack.app.cli import main


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
