"""The Makefile does what the README says of it."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CPU_WHEELS = "https://download.pytorch.org/whl/cpu"


def commands(*words: str) -> list[str]:
    """What make would run, as on a fresh machine; `make test` itself is no parent of it."""
    environment = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL")}
    command = ["make", "-n", "-B", *words]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


@pytest.mark.parametrize("index", [CPU_WHEELS, ""])
def test_torch_index_is_one_more_index_for_every_install(index):
    installs = [line for line in commands("train", f"TORCH_INDEX={index}") if "pip install" in line]
    assert len(installs) == 2
    assert all((f"--extra-index-url {CPU_WHEELS}" in line) == bool(index) for line in installs)


def test_the_two_commands_of_the_readme_train_and_test():
    assert commands("train")[-1].endswith("python train.py")
    assert "pytest" in commands("test")[-1]
