"""tilestack.enable(model): put our ops into a model that exists, say what was done, and undo it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers import PreTrainedModel, Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts, Qwen3MoeMLP
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from tilestack.models.kernel_choice import KernelChoice
from tilestack.models.probe import implementations
from tilestack.models.registration import NAME, register
from tilestack.models.replacement import Slot, slots

_MISSING = object()


@dataclass
class Report:
    """What `enable` did to a model.

    replaced: how many modules of each class have our forward now.
    left_alone: what keeps transformers' code, and why.
    kernels: the choice of implementations.
    model: what was changed.
    """

    model: nn.Module

    replaced: dict[str, int] = field(default_factory=dict)
    left_alone: dict[str, str] = field(default_factory=dict)
    kernels: KernelChoice = field(default_factory=KernelChoice)
    _before: list[tuple[Any, str, Any]] = field(default_factory=list, repr=False)

    def undo(self) -> None:
        """Give every module its old class, and the model its old attention and experts; a second call does nothing."""
        while self._before:
            owner, name, value = self._before.pop()
            if value is _MISSING:
                delattr(owner, name)
            else:
                setattr(owner, name, value)

    def count(self, name: str) -> None:
        """One more module of this class has our forward."""
        self.replaced[name] = self.replaced.get(name, 0) + 1

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Set an attribute so that `undo` restores it."""
        self._before.append((owner, name, getattr(owner, name, _MISSING)))
        setattr(owner, name, value)

    def implementations(self) -> dict[str, str]:
        """Which implementation of each op the model would run as it is now, or why none takes its shapes."""
        first = next(self.model.parameters())
        return implementations(next(_configs(self.model)), self.kernels, first.device, first.dtype)

    def __str__(self) -> str:
        lines = [f"  {count:4d} x {name}" for name, count in sorted(self.replaced.items())]
        lines += [f"  left alone: {name}: {reason}" for name, reason in self.left_alone.items()]
        lines += [f"  {op}: {name}" for op, name in self.implementations().items()]
        return "\n".join(["tilestack replaced:", *lines])


def enable(
    model: nn.Module,
    kernels: KernelChoice | Mapping[str, str] | None = None,
    *,
    attention: bool = True,
    experts: bool = True,
) -> Report:
    """Let a transformers Qwen3-MoE model run on our ops, in place.

    model: a Qwen3MoeForCausalLM, or any module with a Qwen3MoeModel in it (other heads, PEFT wrappers).
    kernels: the implementation of each op; None leaves all to the dispatcher.
    attention, experts: False keeps the model's attn_implementation, experts_implementation.

    Returns a Report; `report.undo()` restores the model. Parameters are neither copied nor renamed.
    Raises ValueError if the model has nothing that we can replace, or `kernels` names what does not exist.
    """
    register()
    kernels = KernelChoice.of(kernels)
    found = list(slots(model))
    if not found:
        raise ValueError(
            f"enable: {type(model).__name__} has no module of transformers' Qwen3-MoE; "
            "tilestack replaces the layers of Qwen3MoeForCausalLM and of models built on Qwen3MoeModel"
        )
    report = Report(model, kernels=kernels)
    for slot in found:
        reason = _keeps(slot)
        if reason:
            report.left_alone[slot.name] = reason
        else:
            _replace(slot, kernels, report)
    for config in _configs(model):
        _use_interfaces(config, report, attention, experts)
    for module in model.modules():
        if isinstance(module, Qwen3MoeExperts) and module.config._experts_implementation == NAME:
            report.count("Qwen3MoeExperts")
            report.set(module, "kernels", kernels)
    return report


def _replace(slot: Slot, kernels: KernelChoice, report: Report) -> None:
    report.count(slot.ours.__name__)
    if not slot.is_ours:
        report.set(slot.module, "__class__", slot.ours)
    report.set(slot.module, "kernels", kernels)
    if isinstance(slot.module, PreTrainedModel):  # transformers looks up by class which outputs it can record
        _CAN_RECORD_REGISTRY.setdefault(str(slot.ours), slot.module._can_record_outputs)


def _keeps(slot: Slot) -> str | None:
    """Why a module keeps transformers' code; None if it does not."""
    if isinstance(slot.module, Qwen3MoeMLP) and slot.module.config.hidden_act != "silu":
        return f"our op is SwiGLU, hidden_act is {slot.module.config.hidden_act!r}"
    if isinstance(slot.module, nn.Linear) and slot.module.bias is not None:
        return "our fused loss has no bias"
    return None


def _configs(model: nn.Module) -> Iterator[Qwen3MoeConfig]:
    """Every Qwen3-MoE configuration that a part of the model reads, once."""
    configs = [getattr(module, "config", None) for module in model.modules()]
    yield from {id(each): each for each in configs if isinstance(each, Qwen3MoeConfig)}.values()


def _use_interfaces(config: Qwen3MoeConfig, report: Report, attention: bool, experts: bool) -> None:
    if not attention:
        report.left_alone["attention"] = f"attn_implementation={config._attn_implementation!r} was asked for"
    else:
        report.set(config, "_attn_implementation_internal", NAME)
    if not experts:
        report.left_alone["experts"] = f"experts_implementation={config._experts_implementation!r} was asked for"
    elif config.hidden_act != "silu":
        report.left_alone["experts"] = f"our op is SwiGLU, hidden_act is {config.hidden_act!r}"
    else:
        report.set(config, "_experts_implementation_internal", NAME)
