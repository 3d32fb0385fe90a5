"""docs/scaling.md: the model of a step on many GPUs, with the rates that the result files have."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from tilestack.bench.results import FOLDER, read
from tilestack.bench.step import qwen3_30b_a3b
from tilestack.distributed.step_model import H100, Machine
from tilestack.models.flops import training_flops_per_token

GLUE = ("norms and residuals", "q and k norm, rotary", "router")


def measured(folder: Path = FOLDER) -> Machine:
    """H100 with the rates of the result files in place of the rounded ones; its links are as they are."""
    attention = read(folder / "attention" / "1xH100.json")
    moe = read(folder / "moe" / "1xH100.json")
    return dataclasses.replace(
        H100,
        attention=_attention(attention["rows"]),
        experts=_experts(moe["rows"]),
        copy=attention["ceilings"]["copy_gbps"],
        **_of_the_trace(read(folder / "trace" / "1xH100.json")),
    )


def _attention(rows: list[dict]) -> dict[int, tuple[float, float]]:
    """Of the model's own heads, causal, in dense batches of 16,384 tokens."""
    found: dict[int, dict[str, float]] = {}
    for row in rows:
        case = row["case"]
        own = (case["heads"], case["kv_heads"], case["head_dim"]) == (32, 4, 128) and case["layout"] == "dense"
        plain = case["causal"] and case["window"] == [-1, -1] and not case["deterministic"]
        if own and plain and row["implementation"] == "tilestack" and row["tflops"]:
            found.setdefault(case["seqlen"], {})[row["direction"]] = row["tflops"]
    return {
        length: (each["forward"], each["backward"])
        for length, each in found.items()
        if {"forward", "backward"} <= {*each}
    }


def _experts(rows: list[dict]) -> dict[int, tuple[float, float]]:
    found: dict[int, dict[str, float]] = {}
    for row in rows:
        case = row["case"]
        if row["implementation"] == "tilestack" and case["routing"] == "random" and row["tflops"]:
            found.setdefault(case["tokens"] * case["top_k"] // case["experts"], {})[row["direction"]] = row["tflops"]
    return {count: (each["forward"], each["both"]) for count, each in found.items() if {"forward", "both"} <= {*each}}


def _of_the_trace(run: dict) -> dict[str, float]:
    """Rates of the parts that no bench times alone, from the recorded step."""
    model, ours = run["configuration"]["model"], run["rows"][0]
    tokens = run["configuration"]["data"]["micro_batch_tokens"]
    milliseconds = {part["part"]: part["ms"] for part in ours["parts"]}
    config = qwen3_30b_a3b(model["layers"])
    without_layers = qwen3_30b_a3b(0)
    projected = 6 * model["layers"] * 2048 * 128 * (2 * 32 + 2 * 4)
    glue = sum(milliseconds[part] for part in GLUE)
    return {
        "projections": projected * tokens / milliseconds["attention projections"] / 1e9,
        "head": training_flops_per_token(without_layers, 0) * tokens / milliseconds["LM head and losses"] / 1e9,
        "glue_ns": glue * 1e6 / tokens / config.num_hidden_layers,
    }
