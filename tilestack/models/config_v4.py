"""config.json for readers of transformers 4: they miss keys that transformers 5 renamed, and say nothing."""

from __future__ import annotations

import json
import os
from pathlib import Path


def add_v4_keys(save_directory: str | os.PathLike) -> None:
    """Add num_experts, rope_theta and rope_scaling to the config.json in a folder; transformers 5 ignores them.

    Without them transformers 4 assumes 128 experts and a rope_theta of 10000.
    """
    path = Path(save_directory) / "config.json"
    config = json.loads(path.read_text())
    rope = dict(config["rope_parameters"])
    config["num_experts"] = config["num_local_experts"]
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    new = path.with_suffix(".json.new")
    new.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    new.replace(path)
