"""`tilestack bench trace`: `tilestack trace` of Qwen3-30B-A3B's shape cut to a few layers, beside plain transformers.

The text is Python's language reference, as one document that is cut into sequences of one length. Its byte pairs are
fewer than Qwen's vocabulary: the tokenizer is filled up with tokens that never occur, so that the head has its size.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from tilestack.app.config import Config, DataConfig, ModelConfig, OutputConfig, TrainConfig
from tilestack.app.data.documents import open_source
from tilestack.app.data.tokenizer import train_bpe
from tilestack.app.files import write_text
from tilestack.app.trace.command import without_timelines
from tilestack.app.trace.page import page
from tilestack.app.trace.session import RIVAL, trace
from tilestack.app.trace.terminal import show
from tilestack.bench.results import FOLDER, commit, short_device, versions
from tilestack.distributed import start

BYTE_PAIRS = 32_000
COPIES = 2  # of the text, so that the document does not end while it is traced
WARMUP, STEPS = 3, 3


def configuration(layers: int, batch: int, seqlen: int, source: Path, tokenizer: Path, vocabulary: int) -> Config:
    """One micro-batch of `batch` sequences a step, in bf16."""
    return Config(
        model=ModelConfig(
            dtype="bfloat16", layers=layers, hidden=2048, heads=32, kv_heads=4, head_dim=128, experts=128,
            experts_per_token=8, expert_hidden=768, max_positions=40960, rope_theta=1e6,
        ),
        data=DataConfig(
            source=str(source), tokenizer=str(tokenizer), vocab_size=vocabulary, eval_documents=0,
            sequence_length=seqlen, micro_batch_tokens=batch * seqlen,
        ),
        train=TrainConfig(micro_batches=1),
        output=OutputConfig(name="Qwen3-30B-A3B"),
    )  # fmt: skip


def prepare(folder: Path, vocabulary: int) -> tuple[Path, Path]:
    """Write the text and the tokenizer into `folder`; returns their paths."""
    source = open_source(DataConfig(eval_documents=0))
    text = "\n\n".join(source.epoch(seed=0, epoch=0, start=0))
    (folder / "text.jsonl").write_text(json.dumps({"text": text * COPIES}) + "\n")
    tokenizer = train_bpe(source, min(BYTE_PAIRS, vocabulary))
    tokenizer.add_tokens([f"<|unused {number}|>" for number in range(len(tokenizer), vocabulary)])
    tokenizer.save_pretrained(folder / "tokenizer")
    return folder / "text.jsonl", folder / "tokenizer"


def run(layers: int, batch: int, seqlen: int, folder: Path = FOLDER, vocabulary: int = 151936) -> Path:
    """Trace both, show the picture, write it as a page beside the result file."""
    with tempfile.TemporaryDirectory() as scratch:
        config = configuration(layers, batch, seqlen, *prepare(Path(scratch), vocabulary), vocabulary)
        found = trace(config, start(config.distributed), RIVAL, WARMUP, STEPS, lambda text: print(text, flush=True))
        found = json.loads(json.dumps(found).replace(f"{scratch}/", ""))  # a folder that is no more
    found["command"] = f"tilestack bench trace --layers {layers} --batch {batch} --seqlen {seqlen}"
    show(found)
    path = folder / "trace" / f"1x{short_device()}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path.with_suffix(".html"), page(found))
    record = {
        "bench": "trace",
        "device": found["device"]["name"],
        "versions": versions(),
        "commit": commit(),
        "date": found["date"],
        "ceilings": {name: found["ceilings"][name] for name in ("matmul_tflops", "copy_gbps")},
        "configuration": found["configuration"],
        "rows": without_timelines(found)["runs"],
    }
    write_text(path, json.dumps(record, indent=1) + "\n")
    return path
