from tilestack.kernels.attention.op import attention

__all__ = ["attention"]
