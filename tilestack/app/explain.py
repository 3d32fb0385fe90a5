"""`tilestack explain`: the design's picture, filled in for a configuration and a machine.

For each op it asks the dispatcher, with the metadata of the configuration's own training call, which implementation
would run and why each other one would not. Nothing is allocated and nothing is launched.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
from typing import Any

import torch
from transformers import Qwen3MoeConfig

from tilestack import Qwen3MoeForCausalLM
from tilestack.app.config import Config
from tilestack.app.errors import UserError
from tilestack.app.model import checkpoint_config, new_config
from tilestack.app.parse import take_option
from tilestack.app.start import configure
from tilestack.distributed.deepspeed_settings import check_model
from tilestack.distributed.expert_parallel import ROUTES
from tilestack.distributed.step_model import rows_of_a_token
from tilestack.kernels import ops
from tilestack.kernels.adamw.op import AdamWParams
from tilestack.kernels.attention.op import AttentionParams
from tilestack.kernels.device import Device
from tilestack.kernels.dispatch import Call, Op, TensorSpec, UnsupportedError
from tilestack.kernels.linear_cross_entropy.op import LinearCrossEntropyParams
from tilestack.kernels.moe.op import MoEParams
from tilestack.kernels.qk_norm_rope.op import QKNormRopeParams
from tilestack.kernels.rms_norm.op import RMSNormParams
from tilestack.kernels.router.op import RouterParams
from tilestack.kernels.sort_routes.op import SortRoutesParams
from tilestack.kernels.swiglu.op import SwiGLUParams
from tilestack.models.flops import active_parameters

ARROW = "        |"
FOLDERS = {
    "APPLICATION": "train.py, tilestack/app/",
    "DISTRIBUTED TRAINING": "tilestack/distributed/",
    "MODEL ARCHITECTURES": "tilestack/models/",
    "OPTIMIZED KERNELS": "tilestack/kernels/<op>/",
    "CUDA, cuBLAS, cuDNN": "through PyTorch",
}


def main(argv: list[str]) -> int:
    """The command line; returns the exit code. Raises UserError for wrong input."""
    name, rest = take_option(argv, "device")
    config, _ = configure(rest, prog="tilestack explain")
    print(explain(config, Device.current() if name is None else named_device(name)))
    return 0


def named_device(name: str) -> Device:
    """The device that --device asks for. Raises UserError if the name is none."""
    if name == "cpu":
        return Device("cpu", "cpu", "cpu")
    if not re.fullmatch(r"sm_\d{2,3}|gfx[0-9a-f]{3,4}", name):
        raise UserError(f"--device must be cpu, an architecture like sm_90 or one like gfx942, got {name!r}")
    return Device("cuda", name, name)


def explain(config: Config, device: Device) -> str:
    """The picture in plain text."""
    if config.model.path is None:
        shape = new_config(config.model, config.data.vocab_size, end_of_text=0)
    else:
        shape = checkpoint_config(config.model.path)
    check_model(config.distributed, shape)
    above = facts(config, shape)
    libraries = above.pop("CUDA, cuBLAS, cuDNN")
    boxes = above | {"OPTIMIZED KERNELS": _kernels(config, shape, device), "CUDA, cuBLAS, cuDNN": libraries}
    return f"\n{ARROW}\n".join(_section(title, lines) for title, lines in boxes.items())


def facts(config: Config, shape: Qwen3MoeConfig) -> dict[str, list[str]]:
    """What the configuration makes of each box of the picture but the kernels, in lines."""
    return {
        "APPLICATION": _application(config),
        "DISTRIBUTED TRAINING": _distributed(config),
        "MODEL ARCHITECTURES": _model(config, shape),
        "CUDA, cuBLAS, cuDNN": _libraries(),
    }


def _section(title: str, lines: list[str]) -> str:
    return "\n".join([f"{title:<24}{FOLDERS[title]}", *(f"  {line}".rstrip() for line in lines)])


def _application(config: Config) -> list[str]:
    tokens = config.train.micro_batches * config.data.micro_batch_tokens
    optimizer, schedule = config.optimizer, config.schedule
    return [
        f"data       {config.data.source}, packed to {config.data.micro_batch_tokens:,} tokens, documents cut at "
        f"{config.data.sequence_length:,}",
        f"steps      {config.train.steps:,} of {config.train.micro_batches} micro-batches, {tokens:,} tokens each",
        f"optimizer  AdamW, lr {optimizer.lr:g}, {schedule.decay} decay after {schedule.warmup_steps} steps, "
        f"weight decay {optimizer.weight_decay:g}, clipping at {optimizer.max_grad_norm:g}",
        f"runs       {config.output.folder}/",
    ]  # fmt: skip


def _distributed(config: Config) -> list[str]:
    asked = config.distributed
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    own = asked.engine == "local" or (asked.engine == "auto" and processes == 1)
    stage = "of " + asked.deepspeed_config if asked.zero is None and asked.deepspeed_config else asked.zero
    zero = 2 if stage is None else stage
    deepspeed = f"DeepSpeed, ZeRO {zero}"
    lines = [f"processes  {processes}", f"engine     {'our own loop, one process' if own else deepspeed}"]
    if asked.expert_parallel > 1:
        lines.append(f"experts    split over {asked.expert_parallel} ranks, tokens sent in {asked.expert_chunks} parts")
    if asked.sequence_parallel > 1:
        lines.append(f"rows       split over {asked.sequence_parallel} ranks")
    if own and asked.engine == "auto":
        lines.append(f"           with torchrun --nproc-per-node 2 train.py ...: {deepspeed}")
    return lines


def _model(config: Config, shape: Qwen3MoeConfig) -> list[str]:
    with torch.device("meta"):
        parameters = sum(each.numel() for each in Qwen3MoeForCausalLM._from_config(shape).parameters())
    dtype = config.model.dtype
    kept = {
        "none": "all that the backward pass reads",
        "selective": "each layer's input and attention's output; the rest is computed again",
        "full": "each layer's input; the rest is computed again",
    }[config.model.activation_checkpointing]
    where = ", inputs on the host" if config.model.activation_offload else ""
    return [
        f"model      Qwen3MoeForCausalLM, {config.model.path or 'new'}, {dtype}"
        f"{', float32 master weights' if dtype == 'bfloat16' else ''}",
        f"layers     {shape.num_hidden_layers}, hidden {shape.hidden_size}; vocabulary "
        f"{shape.vocab_size:,}{'' if config.model.path else ' at most'}",
        f"attention  {shape.num_attention_heads} query heads over {shape.num_key_value_heads}, head dimension "
        f"{shape.head_dim}",
        f"experts    {shape.num_experts}, {shape.num_experts_per_tok} a token, hidden {shape.moe_intermediate_size}",
        f"parameters {parameters:,}, {active_parameters(shape):,} multiply each token",
        f"kept       {kept}{where}",
    ]  # fmt: skip


def _kernels(config: Config, shape: Qwen3MoeConfig, device: Device) -> list[str]:
    calls = training_calls(config, shape, device)
    arch = "" if device.name == device.arch else f" ({device.arch})"
    lines = [f"device     {device.name}{arch}"]
    for name, op in ops().items():
        if name in calls:
            lines += ["", *_op(op, calls[name], getattr(config.kernels, name, "auto"))]
    return [*lines, "", f"not called by this training: {', '.join(name for name in ops() if name not in calls)}"]


def _op(op: Op, call: Call, asked: str) -> list[str]:
    first = next(name for name in op.contract.input_names if call.tensors[name] is not None)
    head = f"{op.contract.op} ({first} {list(call.shape(first))}, {str(call.dtype(first))[6:]})"
    try:
        chosen = op.choose(call, asked).name
    except UnsupportedError:
        chosen = None
    lines = [f"{head}: {chosen or 'NOTHING RUNS IT'}"]
    for each in op.implementations:
        if each.name != chosen:
            reason = op.refuses(each, call) or _passed_over(each.name, chosen, asked, call.device)
            lines.append(f"    not {each.name}: {reason}")
        if each.note:
            lines.append(f"        ({each.note})")
    return lines


def _passed_over(name: str, chosen: str | None, asked: str, device: Device) -> str:
    if asked != "auto":
        return f"would take it, but kernels asks for {asked}"
    if name == "reference":
        return "plain torch, slow: on a GPU it is taken only when asked for by name"
    if device.type == "cpu":
        return "on a CPU the reference is taken; the interpreter is for tests"
    return f"would take it, but comes after {chosen}"


def _rows_of_experts(config: Config, tokens: int, top_k: int) -> tuple[int, int]:
    """(rows of one call of the experts, most_routes of it) where the routing is even."""
    ranks, chunks = config.distributed.expert_parallel, config.distributed.expert_chunks
    if ranks == 1:
        return tokens, -1
    routes = tokens * top_k // chunks  # what a rank sends away comes back to it from others
    return round(tokens / chunks * rows_of_a_token(ranks, top_k)), -(-routes // ROUTES) * ROUTES


def training_calls(config: Config, shape: Qwen3MoeConfig, device: Device) -> dict[str, Call]:
    """The call that a training step makes on one rank of each op that the model has, as the dispatcher sees it."""
    dtype, split = getattr(torch, config.model.dtype), config.distributed
    whole_rows, H, D = config.data.micro_batch_tokens, shape.hidden_size, shape.head_dim
    T = whole_rows // split.sequence_parallel
    heads, kv_heads = shape.num_attention_heads, shape.num_key_value_heads
    E, K, I = shape.num_experts // split.expert_parallel, shape.num_experts_per_tok, shape.moe_intermediate_size
    documents = -(-whole_rows // config.data.sequence_length)

    def spec(*size: int, of: torch.dtype = dtype) -> TensorSpec:
        return TensorSpec.contiguous(size, of)

    def call(params: Any, needs_grad: bool = True, **tensors: TensorSpec | None) -> Call:
        return Call(device, tensors, params, needs_grad)

    offsets, experts = spec(documents + 1, of=torch.int32), spec(E, 2 * I, H)
    longest = config.data.sequence_length
    state = spec(E, 2 * I, H, of=torch.float32)
    q, k = spec(1, T, heads, D), spec(1, T, kv_heads, D)
    attended = spec(whole_rows, max(kv_heads // split.sequence_parallel, 1), D)
    rows, most = _rows_of_experts(config, T, K)
    calls = {
        "attention": call(
            AttentionParams(D**-0.5, True, -1, 0, longest, longest, False),
            q=spec(whole_rows, heads // split.sequence_parallel, D), k=attended, v=attended,
            cu_seqlens_q=offsets, cu_seqlens_k=offsets, sinks=None, alibi_slopes=None, dropout_seed=None,
        ),
        "moe": call(
            MoEParams(keep=True, most_routes=most), x=spec(rows, H), gate_up=experts, down=spec(E, H, I),
            topk_ids=spec(rows, K, of=torch.int32), topk_weights=spec(rows, K, of=torch.float32),
            gate_up_grad=None, down_grad=None,
        ),
        "router": call(RouterParams(K, shape.norm_topk_prob), logits=spec(T, shape.num_experts), token_mask=None),
        "sort_routes": call(
            SortRoutesParams(E), needs_grad=False, topk_ids=spec(rows, K, of=torch.int32)
        ),
        "rms_norm": call(
            RMSNormParams(shape.rms_norm_eps), x=spec(1, T, H), weight=spec(H), residual=spec(1, T, H)
        ),
        "qk_norm_rope": call(
            QKNormRopeParams(shape.rms_norm_eps),
            q=q, k=k, q_weight=spec(D), k_weight=spec(D), cos=spec(1, T, D), sin=spec(1, T, D),
        ),
        "linear_cross_entropy": call(
            LinearCrossEntropyParams(-100, "mean", 0.0, 0.0, 0.0, True, True),
            hidden=spec(T, H), weight=spec(shape.vocab_size, H), labels=spec(T, of=torch.int64),
            num_items=spec(of=torch.int64), token_weights=None, weight_gradient_sum=None,
        ),
        "adamw": call(
            AdamWParams(1, config.optimizer.lr, config.optimizer.beta1, config.optimizer.beta2, config.optimizer.eps,
                        config.optimizer.weight_decay),
            needs_grad=False, param=experts, grad=experts, exp_avg=state, exp_avg_sq=state,
            master=None if dtype == torch.float32 else state, grad_scale=spec(of=torch.float32), scalars=None,
            exp_avg_scale=None, exp_avg_sq_scale=None,
        ),
    }  # fmt: skip
    if _has_dense_layers(shape):
        width = spec(1, T, shape.intermediate_size)
        calls["swiglu"] = call(SwiGLUParams(), gate=width, up=width)
    return calls


def _has_dense_layers(shape: Qwen3MoeConfig) -> bool:
    return any(
        layer in shape.mlp_only_layers or (layer + 1) % shape.decoder_sparse_step
        for layer in range(shape.num_hidden_layers)
    )


def _libraries() -> list[str]:
    cudnn = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    versions = {
        "torch": torch.__version__,
        "CUDA": torch.version.cuda or "not in this torch",
        "cuDNN": cudnn or "not in this torch",
        **{each: _version(each) for each in ("triton", "transformers", "deepspeed")},
    }
    return [f"{name:<13}{value}" for name, value in versions.items()]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
