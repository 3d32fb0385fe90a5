"""Files that are whole or not there: atomic writes, and checks of what was written by others."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from tilestack.app.errors import UserError


def write_text(path: Path, text: str) -> None:
    """Write a file that appears at once, whole, and stays after a crash."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder last."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises UserError if it is missing or broken."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is broken: {error}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} must hold a JSON object")
    return found
