from tilestack.kernels.swiglu.op import swiglu

__all__ = ["swiglu"]
