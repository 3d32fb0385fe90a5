"""Errors as people see them: one message that says what is wrong and what to do, no traceback, an exit code."""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130


class UserError(Exception):
    """Wrong input, or a machine that cannot do what was asked. The message is all that is printed."""


class AgreedError(UserError):
    """A UserError that all ranks raise at the same step, so that none need be told to end."""


class StoppedError(Exception):
    """Ctrl-C or SIGTERM was honoured: what is to be kept has been saved. The message says where."""


@contextmanager
def reported() -> Iterator[None]:
    """Print what people can mend as one message and exit (2, or 130 after Ctrl-C); let bugs keep their traceback."""
    try:
        yield
    except StoppedError as error:
        _leave(str(error), EXIT_INTERRUPTED)
    except KeyboardInterrupt:
        _leave("interrupted; nothing was saved after the last checkpoint of the run, if it had one", EXIT_INTERRUPTED)
    except Exception as error:
        message = _in_words(error)
        if message is None:
            raise
        _leave(f"error: {message}", EXIT_USER_ERROR)


def _in_words(error: Exception) -> str | None:
    """What people are told of an error that they can mend; None for a bug."""
    if isinstance(error, UserError):
        return str(error)
    from tilestack.distributed import CheckpointError, LaunchError, SettingsError  # late: with torch and transformers
    from tilestack.kernels import UnsupportedError

    if isinstance(error, CheckpointError | LaunchError | SettingsError | UnsupportedError):
        return str(error)
    return disk_full(error) or out_of_memory(error)


def disk_full(error: BaseException) -> str | None:
    """What to say if `error` means that a disk has no room left, else None; libraries wrap the system's own error."""
    if getattr(error, "errno", None) not in (errno.ENOSPC, errno.EDQUOT) and "No space left on device" not in str(
        error
    ):
        return None
    return f"{error}; make room on that disk. A run goes on from its last complete checkpoint: --resume RUN"


def out_of_memory(error: BaseException) -> str | None:
    """What to say if `error` means that memory ran out, else None."""
    import torch  # late: it takes seconds, and most messages need none of it

    text = str(error)
    cpu = "DefaultCPUAllocator" in text or isinstance(error, MemoryError)
    if not cpu and not isinstance(error, torch.OutOfMemoryError):
        return None
    wanted = re.search(r"(?:allocate|allocate:) ([\d.]+ ?\w+)", text)
    free = re.search(r"([\d.]+ \w+) is free", text)
    parts = ["not enough memory on the " + ("CPU" if cpu else "GPU")]
    if wanted:
        parts.append(f": {wanted[1]} more were needed" + (f", {free[1]} were free" if free else ""))
    return "".join(parts) + (
        "\nwhat to change, in this order: --model.activation_checkpointing full and a lower --data.micro_batch_tokens "
        "(activations), --distributed.zero 2 or 3 over more processes (optimizer, gradients, weights), "
        "--optimizer.moments 8bit or --optimizer.offload true, a smaller model; tilestack plan says what fits"
    )


def _leave(message: str, code: int) -> None:
    if os.environ.get("RANK", "0") == "0" or code == EXIT_USER_ERROR:
        print(message, file=sys.stderr, flush=True)
    raise SystemExit(code)
