"""What a run leaves behind when its last step is done."""

from __future__ import annotations

import shutil
from pathlib import Path

import transformers
from transformers import PreTrainedTokenizerBase

from tilestack.app.config import Config
from tilestack.app.files import sync_folder, write_text
from tilestack.app.metrics import MetricsFile
from tilestack.app.plots import plot_loss
from tilestack.app.processes import wait_for_all
from tilestack.app.sample import sample
from tilestack.app.start import Run
from tilestack.distributed import Engine


def finish(run: Run, config: Config, engine: Engine, tokenizer: PreTrainedTokenizerBase) -> None:
    """Export the model, draw the loss, write a sample, and say where all of it is. Every rank calls it."""
    if config.output.export:
        export(run.export, engine, tokenizer)
    text = sample(engine.model, tokenizer, config.output, config.train.seed) if config.output.sample_tokens else None
    if engine.rank != 0:
        return
    records = MetricsFile(run.metrics).read()
    plot_loss(records, run.folder / "loss.png")
    if text is not None:
        write_text(run.folder / "sample.txt", text + "\n")
    print(summary(run, config, records, text))


def export(folder: Path, engine: Engine, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write the model and its tokenizer as a Hugging Face checkpoint that appears at once, whole."""
    temporary = folder.with_name(f".tmp-{folder.name}")
    if engine.rank == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
    wait_for_all()
    transformers.logging.disable_progress_bar()  # one more bar would say nothing
    engine.export(temporary)
    wait_for_all()
    if engine.rank == 0:
        tokenizer.save_pretrained(temporary)
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
        sync_folder(folder.parent)


def summary(run: Run, config: Config, records: list[dict], text: str | None) -> str:
    """The last words of a run."""
    first, last = records[0], records[-1]
    lines = [f"\nloss {first['loss']:.4f} at step {first['step']}, {last['loss']:.4f} at step {last['step']}"]
    if "eval_loss" in last:
        lines[0] += f"; on held-out text {last['eval_loss']:.4f}"
    if text is not None:
        lines += ["", "the model writes:", *(f"  | {line}" for line in text.splitlines()), ""]
    places = {
        "configuration": run.folder / "config.yaml",
        "metrics": run.metrics,
        "loss curve": run.folder / "loss.png",
        "checkpoints": run.checkpoints,
    }
    if config.output.export:
        places["model, Hugging Face format"] = run.export
    if text is not None:
        places["sample"] = run.folder / "sample.txt"
    return "\n".join(lines + [f"{name + ':':29}{place}" for name, place in places.items()])
