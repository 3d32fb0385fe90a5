"""A small set of calls for compute-sanitizer, which runs a program some hundred times slower.

    compute-sanitizer --tool memcheck --error-exitcode 9 python -m tilestack.testing.sanitized attention moe ...

Each call is a case of the grid, forward and backward. torch's allocator hands out parts of large blocks, in which a
read beyond a tensor is not seen: PYTORCH_NO_CUDA_MEMORY_CACHING=1 gives every tensor memory of its own.
"""

from __future__ import annotations

import argparse
import sys
import time

import torch

from tilestack.testing.cases import all_cases
from tilestack.testing.compare import Case, evaluate

TRITON = "tilestack-triton"
CALLS = {  # op -> implementation -> cases: odd sizes, pieces that are masked, every kernel at least once
    "attention": {
        "tilestack": (
            "more keys", "packed, spare rows", "soft cap, packed, window", "sinks, packed, spare rows",
            "head dimension 96", "head dimension 256",
        ),
        TRITON: ("more keys", "everything, packed"),
    },
    "moe": {"tilestack": ("partly elsewhere", "recompute"), TRITON: ("partly elsewhere", "wide")},
    "linear_cross_entropy": {TRITON: ("odd vocabulary", "everything, several blocks")},
    "qk_norm_rope": {TRITON: ("fused projection", "head 20")},
    "rms_norm": {TRITON: ("odd width", "residual")},
    "layer_norm": {TRITON: ("odd width", "dropout")},
    "router": {TRITON: ("odd experts", "masked")},
    "sort_routes": {TRITON: ("partly elsewhere", "several blocks")},
    "adamw": {TRITON: ("clipped", "strided grad")},
    "attention_kvcache": {TRITON: ("odd pages", "splits, window", "new keys")},
    "kv_cache_append": {TRITON: ("over a page's end",)},
    "cross_entropy": {TRITON: ("more than a block",)},
    "cross_entropy_gradient": {TRITON: ("more than a block",)},
    "rotary": {TRITON: ("packed with offsets",)},
    "swiglu": {TRITON: ("odd width, fused",)},
}  # fmt: skip


def calls(op: str) -> list[tuple[str, Case]]:
    """The op's calls: implementation and case."""
    small = [case for case in all_cases()[op].cases if not case.gpu_only]
    return [
        (implementation, case) for implementation, wanted in CALLS[op].items() for case in small if case.name in wanted
    ]


def main(argv: list[str] | None = None) -> int:
    """Run the calls; each is printed when the device has finished it, with its seconds."""
    parser = argparse.ArgumentParser(prog="python -m tilestack.testing.sanitized", description=__doc__.split("\n")[0])
    parser.add_argument("op", nargs="*", help=f"default: {', '.join(CALLS)}")
    for name in parser.parse_args(argv).op or CALLS:
        op = all_cases()[name]
        for implementation, case in calls(name):
            started = time.perf_counter()
            tensors = case.make(torch.bfloat16, torch.device("cuda"), torch.Generator().manual_seed(0))
            evaluate(op, case, tensors, implementation)
            torch.cuda.synchronize()
            print(f"ran {name}, {implementation}: {case.name} ({time.perf_counter() - started:.1f} s)", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
