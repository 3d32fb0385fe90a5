"""A run killed with SIGKILL, a real process, at the worst moments: a resume repeats the undisturbed run bit for bit."""

import random
import signal
import time

import pytest
import yaml

from app.tiny_run import numbers, only_run, python, records, write_config
from tilestack.app import checkpoints

# Each makes the process kill itself in the middle of something, in the save after step 4 (step 2 is complete) or later.
MOMENTS = {
    "while the weights are written": """
        import tilestack.distributed.checkpoint as pieces
        write = pieces.write_pieces
        def half(folder, rank, pieces):
            write(folder, rank, pieces)
            if "step-00000004" in str(folder):
                path = folder / "pieces-00000-0000.safetensors"
                os.truncate(path, path.stat().st_size // 2)
                die()
        pieces.write_pieces = half
    """,
    "when all is written but the manifest": """
        write = checkpoints.write_text
        def late(path, text):
            if path.name == "manifest.json" and "step-00000004" in str(path):
                die()
            write(path, text)
        checkpoints.write_text = late
    """,
    "while an old checkpoint is deleted": """
        remove = checkpoints.shutil.rmtree
        def half(path, **options):
            if path.name == ".tmp-old-step-00000002" and path.exists():
                (path / "state.json").unlink()
                die()
            remove(path, **options)
        checkpoints.shutil.rmtree = half
    """,
    "while a line of metrics is written": """
        from tilestack.app.metrics import MetricsFile
        append = MetricsFile.append
        def half(file, records):
            append(file, records)
            if records[-1]["step"] == 6:
                os.truncate(file.path, file.path.stat().st_size - 20)
                die()
        MetricsFile.append = half
    """,
}
HEAD = """
import os, runpy, signal, sys
from tilestack.app import checkpoints
def die():
    os.kill(os.getpid(), signal.SIGKILL)
"""


def resume_and_compare(run, run_train, finished):
    """Resume the killed run in this process; its numbers are those of the run that was never stopped."""
    assert len(checkpoints.complete(run / "checkpoints")) >= 1
    assert run_train("--resume", run) == 0
    assert numbers(run) == numbers(finished)
    assert not list((run / "checkpoints").glob(".tmp*")), "what the killed process left half-written is still there"


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_killed_resumes_from_the_last_complete_checkpoint(moment, finished, run_train, tmp_path):
    source = yaml.safe_load((finished / "config.yaml").read_text())["data"]["source"]
    config = write_config(tmp_path, data={"source": source})
    lines = [line[8:] for line in MOMENTS[moment].splitlines()]
    program = "\n".join([HEAD, *lines, f"sys.argv = ['train.py', '--config', {str(config)!r}]"])
    process = python("-c", program + "\nrunpy.run_path('train.py', run_name='__main__')")
    _, errors = process.communicate(timeout=300)
    assert process.returncode == -signal.SIGKILL, errors
    resume_and_compare(only_run(tmp_path), run_train, finished)


def test_a_run_killed_from_outside_at_any_moment_resumes(finished, run_train, tmp_path):
    source = yaml.safe_load((finished / "config.yaml").read_text())["data"]["source"]
    config = write_config(tmp_path, data={"source": source})
    process = python("train.py", "--config", str(config))
    deadline = time.monotonic() + 300
    while not list(tmp_path.glob("runs/*/checkpoints/step-*")):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.005)
    delay = random.uniform(0, 0.3)
    time.sleep(delay)
    process.kill()
    process.communicate()
    print(f"killed {delay:.3f} s after the first checkpoint, at step {records(only_run(tmp_path))[-1:]}")
    resume_and_compare(only_run(tmp_path), run_train, finished)
