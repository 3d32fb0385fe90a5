"""The configuration that DeepSpeed gets: ours, or the user's own file with what tilestack must know filled in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3MoeConfig

from tilestack.distributed.config import DistributedConfig, OptimizerConfig, SettingsError

DEFAULT_STAGE = 2
# those that are read here; an inner one after the outer
SECTIONS = (
    ("bf16",), ("fp16",), ("optimizer",), ("optimizer", "params"), ("scheduler",), ("data_types",),
    ("zero_optimization",), ("zero_optimization", "offload_optimizer"),
)  # fmt: skip
# what DeepSpeed calls otherwise now; it translates some after tilestack has looked, and ignores others
OLD_NAMES = {
    ("bfloat16",): '"bf16"',
    ("zero_optimization", "cpu_offload"): '"offload_optimizer": {"device": "cpu"}, or leave it out to offload nothing',
    (
        "zero_optimization",
        "cpu_offload_param",
    ): '"offload_param": {"device": "cpu"}, or leave it out to offload nothing',
    ("zero_optimization", "cpu_offload_use_pin_memory"): '"pin_memory" in "offload_optimizer"',
    ("zero_optimization", "stage3_gather_fp16_weights_on_model_save"): '"gather_16bit_weights_on_model_save"',
}
# units (zero_step.py) that our ZeRO-2 reduces at once: those of one layer, whose gradients stay until they have arrived
IN_FLIGHT = 3
UPDATED_TOGETHER = 1 << 28  # parameters, whose gradients DeepSpeed copies while it updates them


def group_sizes(alike: int, numel: int, ranks: int) -> list[int]:
    """ZeRO-2's groups of `alike` weights of one shape, `numel` elements each: how many weights each group has.

    As many as give each of `ranks` ranks whole ones; what the sizes lack of `alike` is left over. DeepSpeed keeps the
    gradient of a weight that a boundary cuts whole on both sides, and copies a group's gradients while it updates it.
    """
    whole, together = alike // ranks * ranks, ranks * max(1, UPDATED_TOGETHER // numel)
    return [min(together, whole - begin) for begin in range(0, whole, together)]


def deepspeed_settings(
    distributed: DistributedConfig,
    optimizer: OptimizerConfig,
    accumulation: int,
    dtype: torch.dtype,
    world_size: int,
) -> dict[str, Any]:
    """The whole DeepSpeed configuration of a training.

    Every value that DeepSpeed 0.19 changed the default of, or that tilestack's arithmetic leans on, is written out.

    Raises SettingsError if the user's file is not readable or contradicts tilestack's configuration.
    """
    settings = construction_settings(distributed, dtype)
    _, data_ranks = distributed.data_ranks(0, world_size)
    own = {
        "train_micro_batch_size_per_gpu": 1,  # one packed row
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": accumulation * data_ranks,
        "gradient_clipping": optimizer.max_grad_norm,
    }
    for key, value in own.items():
        _agree(settings, (key,), value)
    _keep_states(settings, optimizer, accumulation, dtype)
    if "optimizer" in settings:
        params = settings["optimizer"].setdefault("params", {})
        chosen = {"betas": [optimizer.beta1, optimizer.beta2], "weight_decay": optimizer.weight_decay}
        for key, value in {"lr": optimizer.lr, "eps": optimizer.eps, **chosen}.items():
            _agree(settings, ("optimizer", "params", key), value)
            params[key] = value
    return settings


def construction_settings(distributed: DistributedConfig, dtype: torch.dtype) -> dict[str, Any]:
    """The part that decides how parameters are cut up, enough to build a ZeRO-3 model with.

    Raises SettingsError as `deepspeed_settings` does.
    """
    settings = _read(distributed.deepspeed_config) if distributed.deepspeed_config else {}
    for key in ("scheduler", "fp16"):
        if settings.get(key, {"enabled": False}).get("enabled", True):
            reason = (
                "tilestack sets the learning rate of every step" if key == "scheduler" else "tilestack trains in bf16"
            )
            raise SettingsError(f"{distributed.deepspeed_config}: remove {key!r}: {reason}")
    zero = settings.setdefault("zero_optimization", {})
    if distributed.zero is not None:
        _agree(settings, ("zero_optimization", "stage"), distributed.zero)
    zero.setdefault("stage", DEFAULT_STAGE)
    _agree(settings, ("bf16", "enabled"), dtype == torch.bfloat16)
    if dtype == torch.bfloat16:
        settings["bf16"].setdefault("check_grad_overflow", True)
    if (
        zero["stage"] == 2
    ):  # gradients travel beside the backward pass, as DeepSpeed does by itself from ZeRO-3 on alone
        zero.setdefault("overlap_comm", True)
    settings.setdefault("steps_per_print", None)
    settings.setdefault("timers", {"throughput": {"enabled": False}})  # they wait for the device
    settings.setdefault("train_micro_batch_size_per_gpu", 1)
    return settings


def check_processes(distributed: DistributedConfig, world_size: int) -> None:
    """Raise SettingsError if experts or rows cannot be split over so many processes."""
    kept = {"expert_parallel": "keeps all experts on every process", "sequence_parallel": "keeps rows whole"}
    for name, meaning in kept.items():
        ranks = getattr(distributed, name)
        if world_size % ranks:
            raise SettingsError(
                f"distributed.{name} = {ranks} must divide the number of processes, {world_size}; "
                f"--distributed.{name} 1 {meaning}"
            )
    if distributed.expert_parallel > 1 and zero_stage(distributed) not in (1, 2):
        raise SettingsError(
            f"distributed.expert_parallel works with ZeRO 1 or 2, got distributed.zero = {zero_stage(distributed)}"
        )


def check_model(distributed: DistributedConfig, model: Qwen3MoeConfig) -> None:
    """Raise SettingsError if a model of these sizes cannot be split so; before one is built."""
    experts, rows = distributed.expert_parallel, distributed.sequence_parallel
    if model.num_experts % experts:
        raise SettingsError(
            f"distributed.expert_parallel = {experts} must divide the model's {model.num_experts} experts evenly"
        )
    heads, kv_heads = model.num_attention_heads, model.num_key_value_heads
    if heads % rows or (kv_heads % rows and rows % kv_heads):
        raise SettingsError(
            f"distributed.sequence_parallel = {rows} must divide the model's {heads} query heads, and divide or be a "
            f"multiple of its {kv_heads} key heads"
        )


def zero_stage(distributed: DistributedConfig) -> int:
    """The ZeRO stage that is meant: tilestack's, the one in the user's file, or 2. Raises SettingsError."""
    if distributed.zero is not None:
        return distributed.zero
    return _own_zero(distributed).get("stage", DEFAULT_STAGE)


def offloads(distributed: DistributedConfig) -> bool:
    """Whether the user's file keeps the optimizer's state off the device. Raises SettingsError."""
    return _own_zero(distributed).get("offload_optimizer", {}).get("device", "none") != "none"


def _own_zero(distributed: DistributedConfig) -> dict[str, Any]:
    own = _read(distributed.deepspeed_config) if distributed.deepspeed_config else {}
    return own.get("zero_optimization", {})


def _keep_states(settings: dict[str, Any], optimizer: OptimizerConfig, accumulation: int, dtype: torch.dtype) -> None:
    """What gradients are summed in, what master weights are, and where the optimizer's state is."""
    zero = settings["zero_optimization"]
    zero.setdefault("sub_group_size", UPDATED_TOGETHER)
    if dtype == torch.bfloat16 and (zero["stage"] == 1 or (zero["stage"] > 1 and accumulation > 1)):
        # micro-batches' gradients are summed in float32, as our own engine does; ZeRO-1 has no other way that works
        # with experts, and without ZeRO DeepSpeed refuses it
        settings.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")
    if "optimizer" in settings:
        plain = OptimizerConfig()
        for key in ("moments", "master_weights", "offload"):
            if getattr(optimizer, key) != getattr(plain, key):
                raise SettingsError(
                    f"optimizer.{key} = {getattr(optimizer, key)!r} is tilestack's own AdamW, and the DeepSpeed "
                    f"configuration names an optimizer of DeepSpeed's; remove one of them"
                )
        return
    device = zero.get("offload_optimizer", {}).get("device", "none")
    if device != "none" and (optimizer.moments != "float32" or not optimizer.master_weights):
        raise SettingsError(
            f"zero_optimization.offload_optimizer.device={device!r} in the DeepSpeed configuration needs float32 "
            f"moments and master weights, got optimizer.moments = {optimizer.moments!r} and optimizer.master_weights = "
            f"{optimizer.master_weights}; set them to float32 and true, or the device to none"
        )
    if dtype == torch.bfloat16 and not optimizer.master_weights:
        # the second says who makes the moments as it likes, which is our optimizer
        settings["bf16"] |= {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
    if optimizer.offload:
        _agree(settings, ("zero_optimization", "offload_optimizer", "device"), "cpu")
        zero["offload_optimizer"].setdefault("pin_memory", torch.cuda.is_available())
    if zero.get("offload_optimizer", {}).get("device", "none") != "none":
        # torch's fused AdamW updates there: DeepSpeed's own would be compiled on the user's machine
        settings.setdefault("zero_force_ds_cpu_optimizer", False)


def _read(path: str) -> dict[str, Any]:
    try:
        settings = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"distributed.deepspeed_config={path!r} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise SettingsError(f"distributed.deepspeed_config={path!r} is not JSON: {error}") from None
    if not isinstance(settings, dict):
        raise SettingsError(
            f"distributed.deepspeed_config={path!r} must hold a JSON object, got {type(settings).__name__}"
        )
    settings = _without_auto(settings)
    _check_names(path, settings)
    return settings


def _check_names(path: str, settings: dict[str, Any]) -> None:
    """Raise SettingsError for a section that is no object, or a key by a name that DeepSpeed has given up."""
    for keys in SECTIONS:
        value = settings
        for key in keys:
            value = value.get(key, {})
        if not isinstance(value, dict):
            raise SettingsError(f'{path}: {".".join(keys)} must be an object, as "{keys[-1]}": {{...}}, got {value!r}')
    for keys, new in OLD_NAMES.items():
        where = settings.get(keys[0], {}) if len(keys) > 1 else settings
        if keys[-1] in where:
            raise SettingsError(f"{path}: {'.'.join(keys)} is an old name of DeepSpeed's; write {new}")


def _without_auto(settings: dict[str, Any]) -> dict[str, Any]:
    """Leave out the values "auto": what tilestack knows is filled in, for the rest DeepSpeed's default holds."""
    return {
        key: _without_auto(value) if isinstance(value, dict) else value
        for key, value in settings.items()
        if value != "auto"
    }


def _agree(settings: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    section = settings
    for key in path[:-1]:
        section = section.setdefault(key, {})
    found = section.setdefault(path[-1], value)
    if found != value:
        raise SettingsError(
            f"the DeepSpeed configuration has {'.'.join(path)}={found!r}, tilestack's has {value!r}; "
            'remove it there (or write "auto") or make them equal'
        )
