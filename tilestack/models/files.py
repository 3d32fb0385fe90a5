"""Files that last: in the lowest layer that writes any."""

from __future__ import annotations

import os
from pathlib import Path


def sync_file(path: Path) -> None:
    """Bring a file's content to the disk."""
    with path.open("rb") as stream:
        os.fsync(stream.fileno())
