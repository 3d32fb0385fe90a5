from tilestack.kernels.attention.op import attention, attention_backward

__all__ = ["attention", "attention_backward"]
