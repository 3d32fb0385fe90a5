from tilestack.kernels.moe.op import moe

__all__ = ["moe"]
