"""The command line of `tilestack plan`."""

from __future__ import annotations

import json
import re
from typing import Any

import torch
from rich.console import Console
from transformers import PretrainedConfig

from tilestack.app.config import Config, check
from tilestack.app.errors import UserError
from tilestack.app.parse import take_option
from tilestack.app.plan.models import planned_model
from tilestack.app.plan.proposals import Plan, plan, proposals, training_of
from tilestack.app.plan.show import show_plan, show_proposals
from tilestack.app.start import configure
from tilestack.distributed.deepspeed_settings import check_model
from tilestack.distributed.memory_model import GIB

# GiB as torch reports them (get_device_properties), and with 10^9 bytes what the names promise
GPUS = {"H100": 79.2, "H200": 139.8, "A100": 79.2}
HOW = ("dtype", "activation_checkpointing", "activation_offload")  # keys of the model that are no sizes


def main(argv: list[str]) -> int:
    """The command line; returns the exit code: 0 if the configuration fits or some were found, else 1."""
    as_json, rest = "--json" in argv, [word for word in argv if word != "--json"]
    asked: dict[str, str | None] = {}
    for name in ("model", "layers", "gpus", "gpu", "seqlen", "step-tokens"):
        asked[name], rest = take_option(rest, name)
    gpus = _number("gpus", asked["gpus"], torch.cuda.device_count() or 1)
    gpu, gpu_bytes = _gpu(asked["gpu"])
    config, _ = configure(rest, prog="tilestack plan")
    layers = None if asked["layers"] is None else _number("layers", asked["layers"], 1)
    name, shape = planned_model(asked["model"], layers, config)
    head = {"model": name, "gpus": gpus, "gpu": gpu, "gpu_bytes": gpu_bytes}
    if _names_a_training(rest):
        found = [_planned(config, shape, gpus, gpu_bytes)]
    else:
        step_tokens = None if asked["step-tokens"] is None else _number("step-tokens", asked["step-tokens"], 1)
        found = proposals(shape, gpus, gpu_bytes, _number("seqlen", asked["seqlen"], 4096), step_tokens)
    if as_json:
        print(json.dumps(head | {"configurations": [as_plain(each) for each in found]}, indent=1))
    else:
        (show_plan if _names_a_training(rest) else show_proposals)(head, found, Console(highlight=False))
    return int(not found or found[0].room < 0)


def _names_a_training(options: list[str]) -> bool:
    """Whether options say how to train, and not only of what shape the model is."""
    shape_only = [word for word in options if word.startswith("--model.") and word[8:].split("=")[0] not in HOW]
    return sum(word.startswith("--") for word in options) > len(shape_only)


def _planned(config: Config, shape: PretrainedConfig, gpus: int, gpu_bytes: float) -> Plan:
    check(config, gpus)
    check_model(config.distributed, shape)
    return plan(shape, training_of(config, gpus), gpu_bytes)


def _number(name: str, text: str | None, default: int) -> int:
    if text is None:
        return default
    if not text.isdigit() or int(text) < 1:
        raise UserError(f"--{name} must be a whole number from 1 on, got {text!r}")
    return int(text)


def _gpu(text: str | None) -> tuple[str, float]:
    """(what to call it, its bytes)."""
    if text is None and torch.cuda.is_available():
        return torch.cuda.get_device_name(0), float(torch.cuda.get_device_properties(0).total_memory)
    text = text or "H100"
    if text.upper() in GPUS:
        return text.upper(), GPUS[text.upper()] * GIB
    found = re.fullmatch(r"([\d.]+) ?(GB|GiB)?", text)
    if not found or (found[2] is None and float(found[1]) < 1e9):
        raise UserError(f"--gpu must be {', '.join(GPUS)}, or memory as 80GB, 79.2GiB or in bytes, got {text!r}")
    return text, float(found[1]) * {"GB": 1e9, "GiB": GIB, None: 1}[found[2]]


def as_plain(each: Plan) -> dict[str, Any]:
    """What JSON says of a plan. Bytes of each GPU, milliseconds of a step."""
    return {
        "options": each.options,
        "fits": each.room >= 0,
        "total_bytes": round(each.memory.total),
        "room_bytes": round(each.room),
        "allocated_bytes": round(each.memory.allocated),
        "outside_bytes": round(each.memory.outside),
        "highest": each.memory.highest,
        "moments": {
            moment: {part: round(size) for part, size in parts.items()} for moment, parts in each.memory.moments.items()
        },
        "host_bytes": round(each.host_bytes),
        "step_ms": {part: round(time, 2) for part, time in vars(each.time).items()}
        | {"total": round(each.time.total, 2)},
        "tokens_per_second_per_gpu": round(each.tokens_per_second),
        "tflops_per_gpu": round(each.tflops, 1),
    }
