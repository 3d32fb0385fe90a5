"""The optimised kernels: tensors in, tensors out. One folder an op; needs torch and triton, nothing else."""

from tilestack.kernels.attention import attention
from tilestack.kernels.dispatch import UnsupportedError, ops
from tilestack.kernels.rms_norm import rms_norm

__all__ = ["UnsupportedError", "attention", "ops", "rms_norm"]
