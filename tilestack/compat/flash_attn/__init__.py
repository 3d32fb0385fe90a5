"""flash-attn 2.8.3's Python interface over tilestack's kernels: same modules, names, parameters and results.

    from tilestack.compat.flash_attn import flash_attn_func     # instead of: from flash_attn import flash_attn_func
    import tilestack.compat.flash_attn.as_flash_attn            # or: `flash_attn` is this package, in this process

README.md says what is covered and what differs. Source: Dao-AILab/flash-attention, tag v2.8.3.
"""

from tilestack.compat.flash_attn.flash_attn_interface import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)

__version__ = "2.8.3"

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]
