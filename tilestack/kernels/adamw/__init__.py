from tilestack.kernels.adamw.op import adamw

__all__ = ["adamw"]
