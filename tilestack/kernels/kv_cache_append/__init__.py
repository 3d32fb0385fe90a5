from tilestack.kernels.kv_cache_append.op import kv_cache_append

__all__ = ["kv_cache_append"]
