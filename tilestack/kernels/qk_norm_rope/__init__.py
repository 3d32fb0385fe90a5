from tilestack.kernels.qk_norm_rope.op import qk_norm_rope

__all__ = ["qk_norm_rope"]
