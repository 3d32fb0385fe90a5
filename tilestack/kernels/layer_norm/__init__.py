from tilestack.kernels.layer_norm.op import layer_norm

__all__ = ["layer_norm"]
