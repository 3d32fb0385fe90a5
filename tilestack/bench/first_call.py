"""The first call of a process: with no compiled kernel on the disk, and with all of them."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator

import torch


@contextlib.contextmanager
def no_compiled_kernels() -> Iterator[None]:
    """The caches on the disk in an empty folder, for this process's children."""
    with tempfile.TemporaryDirectory() as folder:
        caches = {
            "TRITON_CACHE_DIR": folder,
            "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED": "1",  # off by default
            "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR": folder,
            "QUACK_CACHE_DIR": folder,
        }
        before = {name: os.environ.get(name) for name in caches}
        os.environ.update(caches)
        try:
            yield
        finally:
            for name, value in before.items():
                os.environ.pop(name)
                if value is not None:
                    os.environ[name] = value


def seconds_of(call: Callable[[], object]) -> float:
    """Seconds until the GPU is done with one call."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - started
