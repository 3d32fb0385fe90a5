"""train.py as a module, for tests that run it in this process."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from app.tiny_run import only_run, write_config


@pytest.fixture(scope="session")
def train_script():
    """train.py, imported."""
    spec = importlib.util.spec_from_file_location("train_script", Path(__file__).parents[2] / "train.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def finished(tmp_path_factory, train_script):
    """The folder of a tiny run of 8 steps that nothing disturbed."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("finished")
    train_script.main(["--config", str(write_config(folder))])
    torch.set_num_threads(threads)
    return only_run(folder)


@pytest.fixture
def run_train(train_script):
    """train.py's main in this process, with one thread, as the subprocesses of the tests have; gives its exit code."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def run(*words: object) -> int:
        try:
            train_script.main([str(word) for word in words])
        except SystemExit as leaving:
            return leaving.code
        return 0

    yield run
    torch.set_num_threads(threads)
