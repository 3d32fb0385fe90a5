"""What a training step holds of the GPUs' memory, measured: `tilestack plan` is compared with it.

Every case runs in processes of its own, one a GPU, because an allocator and DeepSpeed remember what they had. While one
case runs the next ones' processes import what they need, and wait for their turn.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import Qwen3MoeConfig

from tilestack.bench.drawing import DrawnInPlace
from tilestack.bench.results import FOLDER, Recorder, Row
from tilestack.bench.step import qwen3_30b_a3b
from tilestack.distributed.memory_model import Memory, Training, memory

STEPS, FIRST = 6, 2  # the first ones compile and make states
AHEAD = 2  # cases whose processes import meanwhile
PATIENCE_S, PATIENCE_OF_A_LAYER_S = 45.0, 2.0
POLL_S = 0.05


@dataclass(frozen=True)
class MemoryCase:
    """Qwen3-30B-A3B with fewer layers, trained in bfloat16; the names are those of the configuration."""

    layers: int
    gpus: int = 2
    zero: int | None = 2
    expert_parallel: int = 1
    sequence_parallel: int = 1
    micro_batch_tokens: int = 4096
    accumulation: int = 1
    checkpointing: str = "none"
    activation_offload: bool = False
    moments: str = "float32"
    master_weights: bool = True
    offload: bool = False
    seqlen: int = 4096
    model: str = "Qwen3-30B-A3B"


NARROW = {"moments": "8bit", "master_weights": False}
# the full model on four GPUs; on smaller ones than its state needs they end as rows that say so
FULL = (
    MemoryCase(48, gpus=4, expert_parallel=4, checkpointing="full"),
    MemoryCase(48, gpus=4, expert_parallel=4, checkpointing="full", **NARROW),
    MemoryCase(48, gpus=4, zero=3, checkpointing="full", **NARROW),
    MemoryCase(48, gpus=4, expert_parallel=4, checkpointing="full", offload=True),
)
CASES = (  # the first ones have least in common: a run may be stopped at a time limit
    *FULL,
    MemoryCase(6, offload=True, checkpointing="full", micro_batch_tokens=16384),
    MemoryCase(6, expert_parallel=2, accumulation=2, moments="bfloat16", micro_batch_tokens=8192),
    MemoryCase(4, zero=0),
    MemoryCase(6, zero=1, moments="bfloat16"),
    MemoryCase(8, zero=3, sequence_parallel=2, checkpointing="selective", micro_batch_tokens=65536, seqlen=65536),
    MemoryCase(8, sequence_parallel=2, micro_batch_tokens=32768, moments="bfloat16"),
    MemoryCase(6, gpus=1, zero=None, checkpointing="full", micro_batch_tokens=32768, accumulation=2, **NARROW),
    MemoryCase(24, zero=3, checkpointing="full", **NARROW),  # for each GPU as 48 layers on four
    MemoryCase(24, expert_parallel=2, checkpointing="full", **NARROW),
    MemoryCase(6, zero=3, micro_batch_tokens=8192),
    MemoryCase(8, zero=3, offload=True, checkpointing="full", activation_offload=True, micro_batch_tokens=16384),
    MemoryCase(6, micro_batch_tokens=8192),
    MemoryCase(8, checkpointing="full", micro_batch_tokens=16384, moments="8bit"),
    MemoryCase(8, expert_parallel=2),
    MemoryCase(4, gpus=1, zero=None),
)


def run(folder: Path = FOLDER, cases: tuple[MemoryCase, ...] = CASES) -> Path:
    """Measure the cases that the machine has GPUs for; a case that fails is a row that says why."""
    cases = tuple(case for case in cases if case.gpus <= max(torch.cuda.device_count(), 1))
    recorder = Recorder("plan", {}, folder, _described)
    with tempfile.TemporaryDirectory() as place:
        waiting = [_Processes(case, Path(place, str(number))) for number, case in enumerate(cases[:AHEAD])]
        for number, case in enumerate(cases):
            if number + AHEAD < len(cases):
                waiting.append(_Processes(cases[number + AHEAD], Path(place, str(number + AHEAD))))
            recorder.add(_row(case, waiting.pop(0).run()))
    return recorder.finish()


def training_of(case: MemoryCase) -> Training:
    """The case as the plan has it."""
    return Training(
        gpus=case.gpus, micro_batch_tokens=case.micro_batch_tokens, seqlen=case.seqlen, accumulation=case.accumulation,
        zero=case.zero or 0, deepspeed=case.zero is not None, expert_parallel=case.expert_parallel,
        sequence_parallel=case.sequence_parallel, checkpointing=case.checkpointing,
        activation_offload=case.activation_offload, offload=case.offload, moments=case.moments,
        master_weights=case.master_weights,
    )  # fmt: skip


def predicted(case: MemoryCase) -> Memory:
    """What the plan says of a case."""
    return memory(qwen3_30b_a3b(case.layers), training_of(case))


def _described(row: Row) -> str:
    planned = predicted(MemoryCase(**row.case)).allocated / 2**30
    case = {name: value for name, value in row.case.items() if value != getattr(MemoryCase(0), name)}
    return f"{case}  peak {row.peak_gib} GiB, planned {planned:.3f}  {row.gib}  {row.error or ''}"


def _row(case: MemoryCase, found: list[dict] | str) -> Row:
    if isinstance(found, str):
        return Row("memory", asdict(case), "tilestack", "step", error=found)
    worst = max(found, key=lambda rank: rank["peak"])
    gib = {name: value / 2**30 for name, value in worst.items() if name != "ms"}
    ms = max(rank["ms"] for rank in found)
    tokens = case.micro_batch_tokens * case.accumulation / case.sequence_parallel
    return Row(
        "memory", asdict(case), "tilestack", "step", ms_median=ms, tokens_per_s=tokens / ms * 1e3,
        peak_gib=gib["peak"], gib={name: round(value, 3) for name, value in gib.items()},
    )  # fmt: skip


class _Processes:
    """The processes of a case, which begin when `run` says so."""

    def __init__(self, case: MemoryCase, folder: Path):
        folder.mkdir()
        self.folder, self.case = folder, case
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.log = (folder / "log").open("w")
        self.ranks = []
        for rank in range(case.gpus):
            places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": case.gpus, "MASTER_PORT": port}
            environment = os.environ | {name: str(value) for name, value in places.items()}
            command = [sys.executable, "-m", "tilestack.bench.memory", str(folder), json.dumps(asdict(case))]
            environment["MASTER_ADDR"] = "127.0.0.1"
            self.ranks.append(subprocess.Popen(command, env=environment, stdout=self.log, stderr=subprocess.STDOUT))

    def run(self) -> list[dict] | str:
        """What each rank found, or what went wrong."""
        (self.folder / "go").touch()
        patience = time.monotonic() + PATIENCE_S + PATIENCE_OF_A_LAYER_S * self.case.layers
        try:
            codes = [rank.wait(max(1.0, patience - time.monotonic())) for rank in self.ranks]
        except subprocess.TimeoutExpired:
            codes = ["no end"]
        finally:
            for rank in self.ranks:
                rank.kill()
            self.log.close()
        if any(codes):
            lines = (self.folder / "log").read_text().strip().splitlines()
            print("\n".join(lines[-20:]), file=sys.stderr, flush=True)
            named = [line for line in lines if "Error" in line]
            return f"{codes}: {(named or lines or [''])[-1][:300]}"
        return [json.loads((self.folder / f"{rank}.json").read_text()) for rank in range(self.case.gpus)]


def measure(case: MemoryCase, config: Qwen3MoeConfig) -> dict[str, float]:
    """Bytes of this rank: resident between steps, the highest of each stage and of all, taken from the device by
    torch's allocator, and by others (CUDA, NCCL); and the median milliseconds of a step."""
    from tilestack.distributed import DistributedConfig, OptimizerConfig, make_engine, start
    from tilestack.models.weights import outline

    distributed = DistributedConfig(
        engine="local" if case.zero is None else "deepspeed", zero=case.zero, cuda_graphs="off",
        expert_parallel=case.expert_parallel, sequence_parallel=case.sequence_parallel,
    )  # fmt: skip
    optimizer = OptimizerConfig(moments=case.moments, master_weights=case.master_weights, offload=case.offload)
    world = start(distributed)
    model = outline(config, torch.bfloat16)
    engine = make_engine(
        model, optimizer, distributed, case.accumulation, case.checkpointing, case.activation_offload,
        DrawnInPlace(config.initializer_range),
    )  # fmt: skip
    del model
    gc.collect()
    cuda = torch.cuda if world.device.type == "cuda" else None
    peaks: dict[str, int] = {}
    _watch(engine, peaks, cuda)
    milliseconds = []
    for step in range(STEPS):
        if step == FIRST:
            peaks.clear()
        if cuda:
            cuda.synchronize()
        started = time.perf_counter()
        result = engine.train_step([_micro_batch(case, config, world.device) for _ in range(case.accumulation)], 1e-5)
        loss = result.loss.item()
        milliseconds.append((time.perf_counter() - started) * 1e3)
    assert loss == loss, "the loss is NaN"
    median = statistics.median(milliseconds[FIRST:])
    if not cuda:
        return peaks | {"peak": 0, "ms": median}
    free, total = cuda.mem_get_info()
    return peaks | {
        "resident": cuda.memory_allocated(), "peak": max(peaks.values()), "reserved": cuda.max_memory_reserved(),
        "outside": total - free - cuda.memory_reserved(), "ms": median,
    }  # fmt: skip


def _watch(engine, peaks: dict[str, int], cuda) -> None:
    """Let the engine's stages note the highest memory of each, and what was there when it began."""
    import tilestack.distributed.local as local
    from tilestack.distributed.stages import stage

    @contextlib.contextmanager
    def watched(name: str) -> Iterator[None]:
        if cuda:
            peaks[f"before {name}"] = max(peaks.get(f"before {name}", 0), cuda.memory_allocated())
            cuda.reset_peak_memory_stats()
        with stage(name):
            yield
        peaks[name] = max(peaks.get(name, 0), cuda.max_memory_allocated() if cuda else 0)

    sys.modules[type(engine).__module__].stage = watched
    local.stage = watched


def _micro_batch(case: MemoryCase, config: Qwen3MoeConfig, device: torch.device) -> dict:
    """Documents of seqlen tokens in one row; ranks that share rows have the same."""
    tokens = case.micro_batch_tokens
    rank = int(os.environ["RANK"]) // case.sequence_parallel
    generator = torch.Generator().manual_seed(rank)
    ids = torch.randint(config.vocab_size, (1, tokens), generator=generator).to(device)
    offsets = torch.arange(0, tokens + 1, min(case.seqlen, tokens), dtype=torch.int32, device=device)
    positions = (torch.arange(tokens, device=device) % case.seqlen)[None]
    ranks = case.gpus // case.sequence_parallel
    return {
        "input_ids": ids, "labels": ids, "position_ids": positions, "cu_seqlens": offsets,
        "num_items": tokens * case.accumulation * ranks,
    }  # fmt: skip


def main() -> None:
    """A rank: import, wait for the turn, measure, write what was found."""
    folder, case = Path(sys.argv[1]), MemoryCase(**json.loads(sys.argv[2]))
    import tilestack.distributed  # what takes the time of a start
    import tilestack.models

    if case.zero is not None:
        import tilestack.distributed.deepspeed_engine  # noqa: F401
    while not (folder / "go").exists():
        time.sleep(POLL_S)
    found = measure(case, qwen3_30b_a3b(case.layers))
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
