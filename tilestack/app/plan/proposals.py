"""A configuration as a plan, and the search for configurations that fit."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig

from tilestack.app.config import Config
from tilestack.distributed.deepspeed_settings import offloads, zero_stage
from tilestack.distributed.memory_model import MOMENT_BYTES, Memory, Training, host_bytes, memory
from tilestack.distributed.step_model import StepTime, step_time, tflops, tokens_per_second

# every way of keeping the state that the search tries, from the most precise: moments, master weights, offload
STATES = (
    ("float32", True, False), ("float32", True, True), ("bfloat16", True, False), ("8bit", True, False),
    ("bfloat16", False, False), ("8bit", False, False),
)  # fmt: skip
OF_A_STATE = 3  # proposals for each
AS_FAST = 1.02  # how much faster less precise a state must be to be worth a line
LONG = 16384  # from here on the search also splits rows over ranks
DEFAULT_STEP_TOKENS = 16384  # of a GPU


@dataclass(frozen=True)
class Plan:
    """What one configuration takes.

    options: the keys of the configuration that give it, as train.py takes them. gpu_bytes: what a GPU has.
    """

    training: Training
    memory: Memory
    time: StepTime
    tokens_per_second: float
    tflops: float
    host_bytes: float
    gpu_bytes: float

    @property
    def room(self) -> float:
        """Bytes of a GPU that are left; negative if it does not fit."""
        return self.gpu_bytes - self.memory.total

    @property
    def options(self) -> dict[str, Any]:
        t = self.training
        ranks = t.gpus // t.sequence_parallel
        found = {
            "model.dtype": t.dtype,
            "data.sequence_length": t.seqlen,
            "data.micro_batch_tokens": t.micro_batch_tokens,
            "train.micro_batches": t.accumulation * ranks,
            "model.activation_checkpointing": t.checkpointing,
            "model.activation_offload": t.activation_offload,
            "distributed.zero": t.zero if t.deepspeed else None,
            "distributed.expert_parallel": t.expert_parallel,
            "distributed.sequence_parallel": t.sequence_parallel,
            "optimizer.moments": t.moments,
            "optimizer.master_weights": t.master_weights,
            "optimizer.offload": t.offload,
        }
        plain = {
            "model.activation_offload": False, "distributed.expert_parallel": 1, "distributed.sequence_parallel": 1,
            "optimizer.moments": "float32", "optimizer.master_weights": True, "optimizer.offload": False,
            "distributed.zero": None, "model.activation_checkpointing": "none",
        }  # fmt: skip
        return {name: value for name, value in found.items() if name not in plain or plain[name] != value}


def plan(shape: PretrainedConfig, training: Training, gpu_bytes: float) -> Plan:
    """What a training of a model takes."""
    training = dataclasses.replace(training, update_bytes=update_bytes(training))
    time = step_time(shape, training)
    return Plan(
        training, memory(shape, training), time, tokens_per_second(training, time), tflops(shape, training, time),
        host_bytes(shape, training), gpu_bytes,
    )  # fmt: skip


def training_of(config: Config, gpus: int) -> Training:
    """The part of a configuration that decides on memory and time, for so many GPUs; `check` was passed."""
    distributed, optimizer = config.distributed, config.optimizer
    deepspeed = distributed.uses_deepspeed(gpus)
    stage = zero_stage(distributed) if deepspeed else 0
    _, ranks = distributed.data_ranks(0, gpus)
    return Training(
        gpus=gpus, micro_batch_tokens=config.data.micro_batch_tokens,
        seqlen=min(config.data.sequence_length, config.data.micro_batch_tokens),
        accumulation=config.train.micro_batches // ranks, zero=stage,
        expert_parallel=distributed.expert_parallel, expert_chunks=distributed.expert_chunks,
        sequence_parallel=distributed.sequence_parallel, checkpointing=config.model.activation_checkpointing,
        offload=optimizer.offload or (deepspeed and offloads(distributed)), dtype=config.model.dtype,
        deepspeed=deepspeed, moments=optimizer.moments,
        master_weights=optimizer.master_weights, activation_offload=config.model.activation_offload,
    )  # fmt: skip


def proposals(
    shape: PretrainedConfig, gpus: int, gpu_bytes: float, seqlen: int, step_tokens: int | None = None
) -> list[Plan]:
    """Configurations that fit, fastest first; a way of keeping the state is left out if a more precise one is as fast.

    seqlen: of the documents. step_tokens: of a step, over all GPUs; None: 16,384 a GPU, or one document if longer.
    """
    tokens = max(step_tokens // gpus if step_tokens else DEFAULT_STEP_TOKENS, 1)
    tried = (plan(shape, training, gpu_bytes) for training in _trainings(shape, gpus, seqlen, tokens))
    fitting = [each for each in tried if each.room >= 0]
    worth, fastest = [], float("inf")
    for state in STATES:
        of_state = [each for each in fitting if _state(each.training) == state]
        best = sorted(of_state, key=_time_of_a_token)[:OF_A_STATE]
        if best and _time_of_a_token(best[0]) * AS_FAST < fastest:
            fastest = _time_of_a_token(best[0])
            worth += best
    return sorted(worth, key=_time_of_a_token)


def _state(training: Training) -> tuple[str, bool, bool]:
    return training.moments, training.master_weights, training.offload


def _time_of_a_token(each: Plan) -> float:
    return 1 / each.tokens_per_second


def _trainings(shape: PretrainedConfig, gpus: int, seqlen: int, tokens: int) -> Iterator[Training]:
    """tokens: of a GPU and step."""
    powers = [each for each in (1, 2, 4, 8, 16) if gpus % each == 0]
    layouts = [(stage, 1) for stage in ((0, 2, 3) if gpus > 1 else (0,))]
    layouts += [(2, ranks) for ranks in powers if ranks > 1 and shape.num_experts % ranks == 0]
    rows = [each for each in powers if each == 1 or (seqlen >= LONG and shape.num_attention_heads % each == 0)]
    modes = ("none", "selective", "full")
    for (zero, experts), split, mode, (moments, master, offload) in itertools.product(layouts, rows, modes, STATES):
        if (offload and zero == 0) or (not master and zero == 0 and gpus > 1):
            continue
        longest = max(tokens * split, seqlen)
        sizes = {seqlen * count for count in (1, 2, 4, 8, 16) if seqlen * count <= longest}
        for micro in sizes:
            accumulation = max(1, round(tokens * split / micro))
            yield Training(
                gpus=gpus, micro_batch_tokens=micro, seqlen=seqlen, accumulation=accumulation, zero=zero,
                expert_parallel=experts, sequence_parallel=split, checkpointing=mode, offload=offload,
                deepspeed=gpus > 1, moments=moments, master_weights=master,
            )  # fmt: skip


def update_bytes(t: Training) -> float:
    """Of memory for a parameter that a rank updates: the norm, AdamW, and the weights' copy from the master."""
    one_pass = not t.deepspeed or (t.zero >= 2 and not t.offload)  # DeepSpeed's own steps widen gradients, copy weights
    wide = t.has_master and (not one_pass or t.accumulation > 1)
    gradient = 4.0 if wide else float(t.itemsize)
    weights = 8.0 if t.has_master else 2.0 * t.itemsize
    copied = (2.0 if one_pass else 6.0) if t.has_master else 0.0
    return 2 * gradient + weights + 2 * MOMENT_BYTES[t.moments] + copied
