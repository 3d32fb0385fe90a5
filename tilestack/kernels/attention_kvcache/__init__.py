from tilestack.kernels.attention_kvcache.op import attention_kvcache

__all__ = ["attention_kvcache"]
