"""torchrun --nproc-per-node 2 train.py: the losses of one process, through DeepSpeed, and a resume."""

import json
import os
import re
import shutil
import sys
import time
from pathlib import Path

import pytest
import transformers
import yaml

from app.tiny_run import numbers, only_run, python, records, write_config


def torchrun(*words: object) -> None:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py")
    process = python(*launcher, *map(str, words))
    said, errors = process.communicate(timeout=500)
    assert process.returncode == 0, f"{said[-2000:]}\n{errors[-4000:]}"


@pytest.fixture(scope="module")
def two(finished, tmp_path_factory) -> Path:
    """The undisturbed tiny run again, on two processes with ZeRO-3."""
    folder = tmp_path_factory.mktemp("two")
    source = yaml.safe_load((finished / "config.yaml").read_text())["data"]["source"]
    torchrun("--config", write_config(folder, data={"source": source}), "--distributed.zero", 3)
    return only_run(folder)


def test_two_processes_have_the_losses_of_one(two, finished):
    for ours, alone in zip(records(two), records(finished), strict=True):
        assert ours["loss"] == pytest.approx(alone["loss"], rel=1e-5), f"step {ours['step']}"
        if "eval_loss" in alone:
            assert ours["eval_loss"] == pytest.approx(alone["eval_loss"], rel=1e-5)


def test_two_processes_leave_one_run_folder_with_everything_in_it(two):
    left = {path.name for path in two.iterdir()}
    assert left == {"config.yaml", "metrics.jsonl", "loss.png", "checkpoints", "export", "sample.txt", "tokenizer"}
    transformers.AutoModelForCausalLM.from_pretrained(two / "export")


def test_two_processes_resume_bit_for_bit_from_a_checkpoint_in_the_middle(two):
    before = numbers(two)
    shutil.rmtree(two / "checkpoints" / "step-00000008")
    torchrun("--resume", two)
    assert numbers(two) == before


KILL = """
import os, pathlib, runpy, signal, sys, time
from tilestack.distributed import deepspeed_engine
forward, calls = deepspeed_engine.StepSums.forward, []
def killed(sums, *arguments):
    share = forward(sums, *arguments)
    calls.append(share)
    if len(calls) == 5 and os.environ["RANK"] == "1":
        pathlib.Path(__file__).with_name("died").write_text(str(time.time()))
        os.kill(os.getpid(), signal.SIGKILL)  # between forward and backward of step 5; the checkpoint is of step 4
    return share
deepspeed_engine.StepSums.forward = killed
runpy.run_path("train.py", run_name="__main__")
"""


def test_a_killed_rank_ends_the_job_with_its_name_and_the_resumed_run_has_the_losses_of_an_unbroken_one(
    two, finished, tmp_path
):
    source = yaml.safe_load((finished / "config.yaml").read_text())["data"]["source"]
    script = tmp_path / "killed.py"
    script.write_text(KILL)
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script))
    options = ("--config", str(write_config(tmp_path, data={"source": source})), "--distributed.zero", "3")
    process = python(*launcher, *options)
    _, errors = process.communicate(timeout=300)
    assert time.time() - float((tmp_path / "died").read_text()) < 60
    run = only_run(tmp_path)
    assert process.returncode != 0
    assert re.search(
        r"error: rank 1 \(host \S+, process \d+\) died in step 5, whose data begins at epoch 0, doc", errors
    )
    assert f"To go on from its last checkpoint: --resume {run}" in errors
    assert "Connection closed by peer" not in errors, "what gloo says of it says less"
    resume_as_slurm_tasks(run)
    assert numbers(run) == numbers(two)


def resume_as_slurm_tasks(run: Path) -> None:
    """What srun starts: no torchrun, the processes know each other by Slurm's variables."""
    step = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "localhost", "SLURM_JOB_ID": str(os.getpid())}
    tasks = [
        python("train.py", "--resume", str(run), also=step | {"SLURM_PROCID": rank, "SLURM_LOCALID": rank})
        for rank in ("0", "1")
    ]
    for task in tasks:
        said, errors = task.communicate(timeout=300)
        assert task.returncode == 0, f"{said[-2000:]}\n{errors[-4000:]}"


@pytest.mark.slow  # the rest of a trace is checked in one process
def test_a_trace_of_two_processes_is_that_of_the_first_with_its_collectives(finished, tmp_path):
    source = yaml.safe_load((finished / "config.yaml").read_text())["data"]["source"]
    command = "import sys; from tilestack.app.cli import main; sys.exit(main(sys.argv[1:]))"
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python")
    options = ("--config", str(write_config(tmp_path, data={"source": source})), "--steps", "1", "--warmup", "1")
    options = (*options, "--distributed.zero", "2", "--out", str(tmp_path / "out"))
    process = python(*launcher, sys.executable, "-c", command, "trace", *options)
    said, errors = process.communicate(timeout=500)
    assert process.returncode == 0, f"{said[-2000:]}\n{errors[-4000:]}"
    found = json.loads((tmp_path / "out" / "trace.json").read_text())
    (run,) = found["runs"]
    box = next(layer for layer in run["layers"] if layer["layer"] == "DISTRIBUTED TRAINING")
    assert "collectives" in {entry["what"] for entry in box["entries"]} and found["device"]["processes"] == 2
    assert said.count("kernels by who wrote them") == 1, "one process speaks"


def test_one_process_goes_on_from_a_checkpoint_of_two(two, finished, tmp_path):
    run = shutil.copytree(two, tmp_path / "run")
    shutil.rmtree(run / "checkpoints" / "step-00000008")
    process = python("train.py", "--resume", str(run), "--distributed.zero", "1")
    said, errors = process.communicate(timeout=500)
    assert process.returncode == 0, f"{said[-2000:]}\n{errors[-4000:]}"
    for ours, alone in zip(records(run), records(finished), strict=True):
        assert ours["loss"] == pytest.approx(alone["loss"], rel=1e-5), f"step {ours['step']}"


def test_two_processes_that_share_rows_and_experts_have_the_losses_of_one(finished, tmp_path):
    source = yaml.safe_load((finished / "config.yaml").read_text())["data"]["source"]
    split = ("--distributed.sequence_parallel", 2, "--distributed.expert_parallel", 2, "--distributed.zero", 2)
    torchrun("--config", write_config(tmp_path, data={"source": source}), *split)
    run = only_run(tmp_path)
    for ours, alone in zip(records(run), records(finished), strict=True):
        assert ours["loss"] == pytest.approx(alone["loss"], rel=1e-5), f"step {ours['step']}"
    assert (run / "sample.txt").read_text()
    transformers.AutoModelForCausalLM.from_pretrained(run / "export")


FULL_DISK = """
import os, runpy, sys
from tilestack.distributed import Saving
write = Saving.write
def full(part, folder):
    write(part, folder)
    if os.environ["RANK"] == "1" and "step-00000004" in str(folder):
        raise OSError(28, "No space left on device")
Saving.write = full
sys.argv = ["train.py", "--distributed.zero", "1", "--config", {config!r}]
runpy.run_path("train.py", run_name="__main__")
"""


@pytest.mark.slow  # what one process does is in test_saving.py
def test_a_checkpoint_of_which_one_process_cannot_write_its_part_is_none(finished, tmp_path):
    source = yaml.safe_load((finished / "config.yaml").read_text())["data"]["source"]
    program = FULL_DISK.format(config=str(write_config(tmp_path, data={"source": source})))
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python")
    process = python(*launcher, sys.executable, "-c", program)
    said, errors = process.communicate(timeout=500)
    assert process.returncode != 0
    assert "step-00000004 could not be written: " in errors and "No space left on device" in errors, errors[-4000:]
    left = [path.name for path in (only_run(tmp_path) / "checkpoints").glob("step-*")]
    assert left == ["step-00000002"]
