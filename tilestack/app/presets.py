"""Where the presets and train.py are, and which preset this machine gets."""

from __future__ import annotations

import sys
from pathlib import Path

import tilestack
from tilestack.app.errors import UserError


def home() -> Path:
    """The folder that holds train.py and configs/: the repository, or where an installed wheel put them."""
    repository = Path(tilestack.__file__).resolve().parents[1]
    for folder in (repository, Path(sys.prefix) / "share" / "tilestack"):
        if (folder / "train.py").is_file() and (folder / "configs").is_dir():
            return folder
    raise UserError(f"train.py and configs/ are neither in {repository} nor in {sys.prefix}/share/tilestack")


def preset() -> Path:
    """The configuration that `train.py` takes when none is named."""
    import torch

    return home() / "configs" / ("small-gpu.yaml" if torch.cuda.is_available() else "tiny-cpu.yaml")
