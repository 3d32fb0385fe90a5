"""Where there is no GPU, Triton kernels run in Triton's interpreter; it must be chosen before they are imported."""

import os

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # a worker for each core: threads that wait for each other's cores only spin
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    import interpreter_shim  # noqa: F401  (mends the interpreter on import)


@pytest.fixture(autouse=torch.cuda.is_available())
def give_memory_back():
    """Processes that share a GPU (pytest -n) keep nothing of it between two tests."""
    yield
    torch.cuda.empty_cache()
