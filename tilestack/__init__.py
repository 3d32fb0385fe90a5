"""tilestack: Qwen3-MoE training as fast as the GPU allows, with kernels in Python."""

__version__ = "0.1.0"
