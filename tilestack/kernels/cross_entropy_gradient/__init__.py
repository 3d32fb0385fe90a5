from tilestack.kernels.cross_entropy_gradient.op import cross_entropy_gradient

__all__ = ["cross_entropy_gradient"]
