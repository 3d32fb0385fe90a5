"""Compiles Hopper kernels of attention for sm_90 and prints, for each head dimension asked for, the instructions of the
forward's loops over tiles, the shortest first, as one JSON object: {"128": [["BAR.SYNC 0xc, 0x100", ...]]}.
"128:1024" has a window, of 1,024 keys to the left.

A program of its own, because kernels of a process with TRITON_INTERPRET=1 cannot be compiled.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget

from tilestack.testing import offline
from tilestack.testing.cases import all_cases
from tilestack.testing.compare import Case


def case(head_dim: int, window: int) -> Case:
    def make(dtype, device, generator):
        q, k, v = (torch.empty(1, 4096, heads, head_dim, dtype=dtype, device=device) for heads in (32, 4, 4))
        absent = ("cu_seqlens_q", "cu_seqlens_k", "sinks", "alibi_slopes", "dropout_seed")
        return {"q": q, "k": k, "v": v, **dict.fromkeys(absent)}

    return Case(f"head dimension {head_dim}", "a loop to look at", make, {"causal": True, "window_size": (window, -1)})


def instructions(head_dim: int, window: int = -1) -> list[tuple[int, str]]:
    launches = offline.record(all_cases()["attention"], case(head_dim, window), "tilestack", "sm_90")
    (each,) = (launch for launch in launches if launch.kernel.__name__ == "attention_forward_kernel")
    source = each.kernel.ASTSource(each.kernel, each.signature, each.constexprs, each.attrs)
    kernel = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=each.options)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        sass = subprocess.run([tool, "-sass", file.name], capture_output=True, text=True, check=True).stdout
    return [(int(at, 16), text) for at, text in re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", sass, re.MULTILINE)]


def inner_loops(found: list[tuple[int, str]]) -> list[list[str]]:
    """The loops with both products of one tile: each from the target of a branch back to the branch."""
    loops = []
    for at, text in found:
        target = re.search(r"\bBRA\S*\s+(?:\S+,\s*)?`?\(?(0x[0-9a-f]+)", text)
        if target and int(target[1], 16) <= at:
            body = [each for place, each in found if int(target[1], 16) <= place <= at]
            products = ["tnspB" in each for each in body if "HGMMA" in each]  # P V's are, those of the scores are not
            if len(set(products)) == 2:
                loops.append((len(products), body))
    fewest = min(count for count, _ in loops)
    return sorted((body for count, body in loops if count == fewest), key=len)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as cache, triton.knobs.cache.scope():
        triton.knobs.cache.dir = cache
        found = {kind: inner_loops(instructions(*map(int, kind.split(":")))) for kind in sys.argv[1:]}
        print(json.dumps(found))
