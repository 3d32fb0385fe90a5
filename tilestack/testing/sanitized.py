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

CALLS = {  # op -> implementation -> cases, of which every kernel has one
    "attention": {
        "tilestack": ("more keys", "packed, spare rows", "soft cap, packed, window", "head dimension 96"),
        "tilestack-triton": ("more keys", "everything, packed"),
    },
    "moe": {
        "tilestack": ("partly elsewhere", "duplicate routes", "recompute"),
        "tilestack-triton": ("partly elsewhere", "wide"),
    },
    "linear_cross_entropy": {"tilestack-triton": None},
    "qk_norm_rope": {"tilestack-triton": None},
    "rms_norm": {"tilestack-triton": None},
    "router": {"tilestack-triton": None},
    "adamw": {"tilestack-triton": None},
    "attention_kvcache": {"tilestack-triton": None},
}


def calls(op: str) -> list[tuple[str, Case]]:
    """The op's calls: implementation and case."""
    small = [case for case in all_cases()[op].cases if not case.gpu_only]
    return [
        (implementation, case)
        for implementation, wanted in CALLS[op].items()
        for case in small
        if wanted is None or case.name in wanted
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
