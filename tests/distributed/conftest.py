"""What two processes found under every setting, for all tests of the engines."""

import os
from pathlib import Path

import pytest

from distributed.launching import launch_two, once


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """One launch for all stages, whose results every test reads: starting and importing cost more than training."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    folder = shared / "deepspeed"
    folder.mkdir(exist_ok=True)
    once(folder, "two", launch_two)
    return folder
