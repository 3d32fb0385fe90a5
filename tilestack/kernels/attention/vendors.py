"""The records of other libraries' attention, and the order in which attention is chosen on a GPU."""

from __future__ import annotations

from tilestack.kernels.dispatch import Implementation

_PACKAGE = "tilestack.kernels.attention"
_NEVER_RUN = "the adapter was tested against a stand-in of the package, never against the package itself"
_FAILED = "against the package itself the adapter failed cases of the grid, those over 128 columns at least"
_RUN_ONCE = "the adapter was tested against a stand-in of the package, and in one case against the package itself"

CUDNN = Implementation("cudnn", f"{_PACKAGE}.vendor_sdpa_cudnn", "cudnn", min_capability=80)
SDPA_FLASH = Implementation("sdpa-flash", f"{_PACKAGE}.vendor_sdpa_flash", "sdpa_flash", min_capability=80)
SDPA_EFFICIENT = Implementation(
    "sdpa-efficient", f"{_PACKAGE}.vendor_sdpa_efficient", "sdpa_efficient", min_capability=80
)
FLASH_ATTN_2 = Implementation(
    "flash-attn-2",
    f"{_PACKAGE}.vendor_flash_attn",
    "flash_attn_2",
    min_capability=80,
    packages=("flash_attn.flash_attn_interface", "flash_attn_2_cuda"),
    note=_NEVER_RUN,
)
FLASH_ATTN_4 = Implementation(
    "flash-attn-4",
    f"{_PACKAGE}.vendor_flash_attn_4",
    "flash_attn_4",
    min_capability=90,
    packages=("flash_attn.cute", "cutlass"),
    note=_RUN_ONCE,
)
XFORMERS = Implementation(
    "xformers",
    f"{_PACKAGE}.vendor_xformers",
    "xformers",
    min_capability=80,
    packages=("xformers.ops.fmha",),
    note=_FAILED,
)

# Before our Triton kernels: libraries with kernels for the machine at hand. cuDNN is installed with torch and needs no
# compiling at first use, so it precedes flash-attn-4.
BEFORE_TRITON = (CUDNN, FLASH_ATTN_4)
# After them: Ampere's instructions on any GPU. flash-attn-2 has most, xFormers waits for the device on packed input,
# torch's two have neither packed input nor windows.
AFTER_TRITON = (FLASH_ATTN_2, XFORMERS, SDPA_FLASH, SDPA_EFFICIENT)
