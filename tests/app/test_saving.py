"""Checkpoints that are written while the training goes on: what is in them, and what fails meanwhile."""

import threading
import time
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file

from app.tiny_run import numbers, only_run, write_config
from tilestack.app import checkpoints, saving
from tilestack.distributed import Saving
from tilestack.distributed.local import LocalEngine


@pytest.fixture
def config(finished, tmp_path):
    """The undisturbed run's configuration, to be run again."""
    return write_config(
        tmp_path, data={"source": yaml.safe_load((finished / "config.yaml").read_text())["data"]["source"]}
    )


def same_checkpoint(ours, theirs) -> bool:
    found, expected = (load_file(each / "pieces-00000-0000.safetensors") for each in (ours, theirs))
    return found.keys() == expected.keys() and all(found[name].equal(expected[name]) for name in expected)


@pytest.mark.parametrize("room", [True, False], ids=["with room for a copy", "without"])
def test_a_checkpoint_holds_the_step_at_which_it_was_saved(room, finished, config, run_train, tmp_path, monkeypatch):
    """With room for a copy it is written after the next step has changed everything, without room before it."""
    stepped, written_after = threading.Event(), []
    train_step, write = LocalEngine.train_step, Saving.write

    def step(engine, *arguments):
        result = train_step(engine, *arguments)
        stepped.set()
        return result

    def late(part, folder):
        stepped.clear()
        if "step-00000006" in str(folder):
            written_after.append(stepped.wait(60 if room else 0.5))
        write(part, folder)

    monkeypatch.setattr(LocalEngine, "train_step", step)
    monkeypatch.setattr(Saving, "write", late)
    if not room:
        monkeypatch.setattr(saving, "free_memory", lambda: 0)
    assert run_train("--config", config) == 0
    assert written_after == [room]
    assert numbers(only_run(tmp_path)) == numbers(finished)
    for name in ("step-00000006", "step-00000008"):
        assert same_checkpoint(only_run(tmp_path) / "checkpoints" / name, finished / "checkpoints" / name)


def test_a_checkpoint_that_cannot_be_written_stops_the_run_and_leaves_the_one_before(
    config, run_train, tmp_path, monkeypatch, capsys
):
    write = Saving.write

    def full(part, folder):
        write(part, folder)
        if "step-00000004" in str(folder):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(Saving, "write", full)
    assert run_train("--config", config) == 2
    said = capsys.readouterr().err
    assert "checkpoints/step-00000004 could not be written: OSError: [Errno 28] No space left on device" in said
    assert [each.name for each in checkpoints.complete(only_run(tmp_path) / "checkpoints")] == ["step-00000002"]


@pytest.mark.parametrize(
    ("failure", "raised", "code"),
    [
        (torch.OutOfMemoryError("out of memory"), None, 2),
        (KeyError("a bug"), KeyError, None),
        (KeyboardInterrupt(), None, 130),
    ],
    ids=["memory ran out", "a bug", "interrupted"],
)
def test_a_checkpoint_that_was_copied_is_written_whatever_breaks_meanwhile(
    failure, raised, code, config, run_train, tmp_path, monkeypatch
):
    break_while_step_4_is_written(monkeypatch, failure)
    if raised is None:
        assert run_train("--config", config) == code
    else:
        with pytest.raises(raised):
            run_train("--config", config)
    assert [each.name for each in checkpoints.complete(only_run(tmp_path) / "checkpoints")][-1] == "step-00000004"


def test_a_checkpoint_that_cannot_be_written_does_not_hide_what_broke_first(config, run_train, monkeypatch, capsys):
    break_while_step_4_is_written(monkeypatch, KeyError("a bug"), OSError(28, "No space left on device"))
    with pytest.raises(KeyError, match="a bug"):
        run_train("--config", config)
    assert "checkpoints/step-00000004 could not be written: OSError: [Errno 28]" in capsys.readouterr().err


def test_with_several_ranks_a_failure_waits_for_the_checkpoint_only_so_long(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(saving, "PATIENCE_S", 0.1)
    goes_on = threading.Event()
    saver = saving.Saver(tmp_path, SimpleNamespace(world_size=2), None, {})
    saver._thread = threading.Thread(target=goes_on.wait, args=(60,), daemon=True)
    saver._thread.start()
    with pytest.raises(KeyError, match="a bug"), saver:
        raise KeyError("a bug")
    assert saver._thread.is_alive()
    assert "not written within 0.1 s" in capsys.readouterr().err
    goes_on.set()


def break_while_step_4_is_written(monkeypatch, failure: BaseException, unwritten: OSError | None = None) -> None:
    """Step 5 fails, and only some time after that checkpoint 4 is written, or is not."""
    broken = threading.Event()
    train_step, write = LocalEngine.train_step, Saving.write

    def step(engine, *arguments):
        if engine.updates == 4:
            broken.set()
            raise failure
        return train_step(engine, *arguments)

    def late(part, folder):
        if "step-00000004" in str(folder):
            assert broken.wait(60)
            time.sleep(0.5)
            if unwritten is not None:
                raise unwritten
        write(part, folder)

    monkeypatch.setattr(LocalEngine, "train_step", step)
    monkeypatch.setattr(Saving, "write", late)


def test_files_that_a_container_has_read_do_not_count_as_memory_in_use(tmp_path):
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("900\n")
    assert saving.free_memory(tmp_path, tmp_path) == 100
    (tmp_path / "memory.stat").write_text("anon 200\ninactive_file 400\nactive_file 200\n")
    assert saving.free_memory(tmp_path, tmp_path) == 700


def test_the_memory_that_is_free_is_known_here():
    assert saving.free_memory() > 1 << 20
