"""A training run of seconds: configuration, documents, and the command line around them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
WORDS = [
    "the",
    "a",
    "model",
    "reads",
    "text",
    "and",
    "learns",
    "which",
    "word",
    "comes",
    "next",
    "when",
    "every",
    "document",
    "tells",
    "it",
    "the",
    "same",
    "story",
]


def write_documents(path: Path, count: int = 40) -> Path:
    """A JSONL file of short documents, no two alike."""
    lines = []
    for number in range(count):
        words = [WORDS[(number * 7 + place * (number % 5 + 1)) % len(WORDS)] for place in range(20 + number % 30)]
        lines.append(json.dumps({"text": f"{number}: " + " ".join(words)}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def tiny_tree(folder: Path, **changes: dict) -> dict:
    """A configuration whose run takes a second; `changes` are keys by group."""
    tree = {
        "model": {
            "layers": 2, "hidden": 32, "heads": 4, "kv_heads": 2, "head_dim": 8, "experts": 16,
            "experts_per_token": 2, "expert_hidden": 16, "max_positions": 64,
        },
        "data": {
            "source": str(folder / "documents.jsonl"), "vocab_size": 300, "sequence_length": 64,
            "micro_batch_tokens": 96, "eval_documents": 4,
        },
        "optimizer": {"lr": 0.01},
        "schedule": {"warmup_steps": 2},
        "train": {
            "steps": 8, "micro_batches": 2, "eval_every": 4, "eval_micro_batches": 2, "save_every": 2,
            "keep_checkpoints": 2,
        },
        "output": {"folder": str(folder / "runs"), "name": "tiny", "log_every": 2, "sample_tokens": 4},
    }  # fmt: skip
    for group, keys in changes.items():
        tree[group] = tree.get(group, {}) | keys
    return tree


def write_config(folder: Path, **changes: dict) -> Path:
    """The configuration file of a tiny run, with its documents beside it."""
    if not (folder / "documents.jsonl").exists():
        write_documents(folder / "documents.jsonl")
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_tree(folder, **changes)), encoding="utf-8")
    return path


def only_run(folder: Path) -> Path:
    """The folder of the one run below `folder`/runs."""
    (run,) = (folder / "runs").iterdir()
    return run


def records(run: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def numbers(run: Path) -> list[tuple]:
    """What must repeat bit for bit of a run: every step's numbers, none of its times."""
    keys = ("step", "loss", "aux_loss", "grad_norm", "lr", "epoch", "expert_load", "eval_loss")
    return [tuple(record.get(key) for key in keys) for record in records(run)]


def python(*words: str, also: dict[str, str] | None = None, **options) -> subprocess.Popen:
    """A Python process of our own, in the repository, alone (not under torchrun), with these variables also.

    Without those that an engine of this very process left behind: tasks told of port 0 would wait for each other.
    """
    launched = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in launched}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | (also or {})
    return subprocess.Popen(
        [sys.executable, *words], cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        **options,
    )  # fmt: skip
