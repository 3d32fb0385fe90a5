"""transformers' Qwen3-MoE with our ops in it.

Importing this package registers attn_implementation="tilestack" and experts_implementation="tilestack" with
transformers, for every model of the process that asks for them by name.
"""

from tilestack.models.enable import Report, enable
from tilestack.models.kernel_choice import KernelChoice
from tilestack.models.layers import ZERO3_LEAF_CLASSES
from tilestack.models.qwen3_moe import Qwen3MoeForCausalLM
from tilestack.models.recomputation import Recomputation, recompute_activations
from tilestack.models.registration import register
from tilestack.models.rotary import restore_rotary_frequencies
from tilestack.models.weights import Weights, drawn, materialise, pretrained

register()

__all__ = [
    "ZERO3_LEAF_CLASSES",
    "KernelChoice",
    "Qwen3MoeForCausalLM",
    "Recomputation",
    "Report",
    "Weights",
    "drawn",
    "enable",
    "materialise",
    "pretrained",
    "recompute_activations",
    "register",
    "restore_rotary_frequencies",
]
