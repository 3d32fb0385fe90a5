from tilestack.kernels.rotary.op import rotary

__all__ = ["rotary"]
