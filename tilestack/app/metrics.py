"""What a run measures. Numbers stay on the device until they are read, every output.log_every steps: one wait each."""

from __future__ import annotations

import json
import math
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from tilestack.app.data.packing import Position, StepBatch
from tilestack.app.errors import AgreedError
from tilestack.app.files import write_text
from tilestack.app.hardware import peak_flops, peak_memory_bytes
from tilestack.distributed import StepResult
from tilestack.models.flops import training_flops_per_token


@dataclass(frozen=True)
class _Pending:
    step: int
    lr: float
    begin: Position
    epoch: int
    tokens: int
    flops: float
    result: StepResult


class Metrics:
    """Collects steps and turns them into records, one a step: see `read`.

    MFU is the share of the GPUs' bf16 peak that the model's own operations reach: causal count, 6 N + 6 L H D S per
    token as Megatron-LM's (N: parameters that a token uses; S: mean length of the piece that a token lies in),
    recomputation not counted.
    """

    def __init__(self, model: PretrainedConfig, device: torch.device, world_size: int, non_finite: str):
        self._model, self._device, self._world_size, self._non_finite = model, device, world_size, non_finite
        peak = peak_flops(device)
        self._peak = None if peak is None else peak * world_size
        self._pending: list[_Pending] = []
        self._since = time.perf_counter()
        self._seconds = 0.0

    def add(self, step: int, batch: StepBatch, result: StepResult, lr: float) -> None:
        """Remember step number `step` (from 1); does not wait for the device."""
        flops = batch.tokens * training_flops_per_token(self._model, batch.mean_length)
        self._pending.append(_Pending(step, lr, batch.begin, batch.position.epoch, batch.tokens, flops, result))

    def read(self) -> list[dict[str, Any]]:
        """The records of the steps since the last reading; waits for the device.

        Keys: step, loss (with the load-balancing loss), aux_loss, grad_norm, lr, epoch, tokens_per_second and mfu (null
        where the peak is unknown) over the steps of this reading, expert_load (largest over mean), memory_gib (peak),
        seconds (training so far, without evaluation and saving). Where loss or gradient was not finite, so that no
        weight took the step up, also: skipped (true) and data (where in the data the step began).
        """
        pending, self._pending = self._pending, []
        if not pending:
            return []
        values = torch.stack([_numbers(each.result) for each in pending]).tolist()
        elapsed = self.pause()
        self._seconds += elapsed
        tokens, flops = sum(each.tokens for each in pending), sum(each.flops for each in pending)
        records = []
        for each, (loss, aux_loss, grad_norm, load) in zip(pending, values, strict=True):
            records.append(
                {
                    "step": each.step,
                    "loss": loss,
                    "aux_loss": aux_loss,
                    "grad_norm": grad_norm,
                    "lr": each.lr,
                    "epoch": each.epoch,
                    "tokens_per_second": round(tokens / elapsed, 1),
                    "mfu": None if self._peak is None else round(flops / elapsed / self._peak, 4),
                    "expert_load": None if math.isnan(load) else round(load, 3),
                    "memory_gib": round(peak_memory_bytes(self._device) / 2**30, 2),
                    "seconds": round(self._seconds, 3),
                }
            )
            if not (math.isfinite(loss) and math.isfinite(grad_norm)):
                records[-1] |= {"skipped": True, "data": asdict(each.begin)}
        return records

    def judge(self, records: list[dict[str, Any]]) -> list[str]:
        """What to say of the steps that no weight took up. All ranks have the same numbers, and so judge alike.

        Raises AgreedError at the first of them, if optimizer.non_finite is "stop".
        """
        said = []
        for record in records:
            if not record.get("skipped"):
                continue
            text = (
                f"step {record['step']}, whose data begins at {Position(**record['data'])}: the loss "
                f"({record['loss']}) or the gradient (norm {record['grad_norm']}) is not finite; no weight took it up"
            )
            if self._non_finite == "stop":
                raise AgreedError(
                    f"{text}. Set optimizer.non_finite to skip to go on without such steps: --resume takes that from "
                    "the last checkpoint; or start again with a lower optimizer.lr"
                )
            said.append(text)
        return said

    def pause(self) -> float:
        """Start the clock anew (after an evaluation or a save); returns the seconds that it ran."""
        now = time.perf_counter()
        elapsed, self._since = now - self._since, now
        return elapsed


class MetricsFile:
    """metrics.jsonl: one line a step, appended and on the disk when `append` returns."""

    def __init__(self, path: Path):
        self.path = path

    def append(self, records: list[dict[str, Any]]) -> None:
        """Append the records."""
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write("".join(json.dumps(record) + "\n" for record in records))
            stream.flush()
            os.fsync(stream.fileno())

    def cut(self, step: int) -> None:
        """Drop what came after `step`, and a line that a kill left unfinished."""
        kept = [record for record in self.read() if record["step"] <= step]
        write_text(self.path, "".join(json.dumps(record) + "\n" for record in kept))

    def read(self) -> list[dict[str, Any]]:
        """Every whole line."""
        if not self.path.exists():
            return []
        lines = self.path.read_text(encoding="utf-8").split("\n")
        return [json.loads(line) for line in lines[:-1]]


def _numbers(result: StepResult) -> torch.Tensor:
    """[loss, aux_loss, grad_norm, largest expert load over the mean] of a step, float32 on the device."""
    load = result.expert_load
    ratio = torch.full_like(result.loss, math.nan) if load is None else load.max() / load.mean()
    return torch.stack([result.loss, result.aux_loss, result.grad_norm, ratio])
