"""The optimised kernels: tensors in, tensors out. One folder an op; needs torch and triton, nothing else."""

from tilestack.kernels.adamw import adamw
from tilestack.kernels.attention import attention, attention_backward
from tilestack.kernels.attention_kvcache import attention_kvcache
from tilestack.kernels.cross_entropy import cross_entropy
from tilestack.kernels.cross_entropy_gradient import cross_entropy_gradient
from tilestack.kernels.dispatch import UnsupportedError, ops
from tilestack.kernels.kv_cache_append import kv_cache_append
from tilestack.kernels.layer_norm import layer_norm
from tilestack.kernels.linear_cross_entropy import linear_cross_entropy
from tilestack.kernels.moe import moe
from tilestack.kernels.qk_norm_rope import qk_norm_rope
from tilestack.kernels.rms_norm import rms_norm
from tilestack.kernels.rotary import rotary
from tilestack.kernels.router import RouterOutput, load_balancing_loss, router, router_z_loss
from tilestack.kernels.sort_routes import Routes, sort_routes
from tilestack.kernels.swiglu import swiglu

__all__ = [
    "RouterOutput",
    "Routes",
    "UnsupportedError",
    "adamw",
    "attention",
    "attention_backward",
    "attention_kvcache",
    "cross_entropy",
    "cross_entropy_gradient",
    "kv_cache_append",
    "layer_norm",
    "linear_cross_entropy",
    "load_balancing_loss",
    "moe",
    "ops",
    "qk_norm_rope",
    "rms_norm",
    "rotary",
    "router",
    "router_z_loss",
    "sort_routes",
    "swiglu",
]
