"""Checkpoints that are written while the training goes on: what is in them, and what fails meanwhile."""

import threading

import pytest
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


def test_the_memory_that_is_free_is_known_here():
    assert saving.free_memory() > 1 << 20
