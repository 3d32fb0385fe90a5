"""What two processes found under every setting, for all tests of the engines."""

from pathlib import Path

import pytest

from distributed.launching import launch_two, once, shared_folder


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """One launch for all stages, whose results every test reads: starting and importing cost more than training."""
    folder = shared_folder(tmp_path_factory, "deepspeed")
    once(folder, "two", launch_two)
    return folder
