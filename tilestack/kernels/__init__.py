"""The optimised kernels: tensors in, tensors out. One folder an op; needs torch and triton, nothing else."""

from tilestack.kernels.adamw import adamw
from tilestack.kernels.attention import attention
from tilestack.kernels.dispatch import UnsupportedError, ops
from tilestack.kernels.linear_cross_entropy import linear_cross_entropy
from tilestack.kernels.qk_norm_rope import qk_norm_rope
from tilestack.kernels.rms_norm import rms_norm
from tilestack.kernels.swiglu import swiglu

__all__ = [
    "UnsupportedError",
    "adamw",
    "attention",
    "linear_cross_entropy",
    "ops",
    "qk_norm_rope",
    "rms_norm",
    "swiglu",
]
