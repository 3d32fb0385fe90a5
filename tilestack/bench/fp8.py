"""`tilestack bench fp8`: what e4m3 products with block scales could bring to the experts of Qwen3-30B-A3B.

In fp8 forward and input gradients would run as DeepSeek-V3's do: activations with a scale for 128 values of a row,
weights with one for 128 x 128, sums in float32. Weight gradients stay in bf16: they contract over tokens, for which
both operands would have to be quantised along the other dimension. Measured here, each alone and at its best:

* products: torch's own (cuBLAS), dense, of all rows at once: an upper bound for products grouped by expert;
* quantisation: each weight once per step, in both orientations (Hopper's fp8 products want both operands contiguous
  along the depth), and the tensors of rows that bf16 keeps in memory anyway.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import triton
import triton.language as tl

from tilestack.bench.results import FOLDER, Row, write
from tilestack.bench.timing import ceilings, measure

BLOCK = 128  # values that share a scale, in DeepSeek-V3 (2024), section 3.3.2
SCALINGS = ("bfloat16", "tensor", "block")


@dataclass(frozen=True)
class ProductCase:
    """[rows, depth] times [depth, width]."""

    rows: int
    depth: int
    width: int
    scaling: str


@dataclass(frozen=True)
class QuantiseCase:
    """what: "rows", with a scale for 128 values, or "weights", with one for 128 x 128, in both orientations."""

    what: str
    height: int
    width: int


@triton.jit
def quantise_rows_kernel(source_ptr, out_ptr, scales_ptr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, WIDTH)
    values = tl.load(source_ptr + row * WIDTH + offs).to(tl.float32).reshape((WIDTH // BLOCK, BLOCK))
    scale = tl.maximum(tl.max(tl.abs(values), 1), 1e-12) / 448.0
    quantised = (values / scale[:, None]).to(out_ptr.dtype.element_ty).reshape((WIDTH,))
    tl.store(out_ptr + row * WIDTH + offs, quantised)
    tl.store(scales_ptr + row * (WIDTH // BLOCK) + tl.arange(0, WIDTH // BLOCK), scale)


@triton.jit
def quantise_weights_kernel(source_ptr, out_ptr, transposed_ptr, scales_ptr, M, N, BLOCK: tl.constexpr):
    m, n = tl.program_id(0), tl.program_id(1)
    rows, columns = m * BLOCK + tl.arange(0, BLOCK), n * BLOCK + tl.arange(0, BLOCK)
    first = tl.program_id(2).to(tl.int64) * M * N
    values = tl.load(source_ptr + first + rows[:, None] * N + columns[None, :]).to(tl.float32)
    scale = tl.maximum(tl.max(tl.max(tl.abs(values), 1), 0), 1e-12) / 448.0
    quantised = (values / scale).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + first + rows[:, None] * N + columns[None, :], quantised)
    tl.store(transposed_ptr + first + columns[:, None] * M + rows[None, :], tl.trans(quantised))
    tl.store(scales_ptr + (tl.program_id(2) * tl.num_programs(0) + m) * tl.num_programs(1) + n, scale)


def product(case: ProductCase) -> Callable[[], torch.Tensor]:
    """The product as a function without arguments, over random values."""
    a = torch.randn(case.rows, case.depth, device="cuda", dtype=torch.bfloat16)
    b = torch.randn(case.width, case.depth, device="cuda", dtype=torch.bfloat16)
    if case.scaling == "bfloat16":
        return lambda: a @ b.T
    if case.scaling == "tensor":
        scale_a = scale_b = torch.ones((), device="cuda")
    else:  # scales of a lie column after column
        scale_a = torch.ones(case.depth // BLOCK, case.rows, device="cuda").T
        scale_b = torch.ones(case.width // BLOCK, case.depth // BLOCK, device="cuda").T
    a, b = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).T
    return lambda: torch._scaled_mm(a, b, scale_a, scale_b, out_dtype=torch.bfloat16)


def quantise(case: QuantiseCase, experts: int) -> Callable[[], object]:
    """The quantisation as a function without arguments; weights: of `experts` matrices."""
    count = experts if case.what == "weights" else 1
    source = torch.randn(count * case.height, case.width, device="cuda", dtype=torch.bfloat16)
    out = torch.empty(source.shape, device="cuda", dtype=torch.float8_e4m3fn)
    if case.what == "rows":
        scales = torch.empty(case.height, case.width // BLOCK, device="cuda")
        return lambda: quantise_rows_kernel[(case.height,)](source, out, scales, WIDTH=case.width, BLOCK=BLOCK)
    transposed = torch.empty_like(out)
    grid = (case.height // BLOCK, case.width // BLOCK, count)
    scales = torch.empty(grid, device="cuda")
    return lambda: quantise_weights_kernel[grid](
        source, out, transposed, scales, case.height, case.width, BLOCK=BLOCK, num_warps=8
    )


def run(tokens: int = 16384, folder: Path = FOLDER) -> Path:
    """Time products and quantisation at the model's shape and write the result file."""
    hidden, intermediate, experts, top_k = 2048, 768, 128, 8
    limits, routes, rows = ceilings(), tokens * top_k, []
    shapes = ((hidden, 2 * intermediate), (intermediate, hidden), (hidden, intermediate), (2 * intermediate, hidden))
    for depth, width in shapes:
        for scaling in SCALINGS:
            case = ProductCase(routes, depth, width, scaling)
            rows.append(_timed("fp8 product", case, lambda case=case: product(case), 2 * routes * depth * width, 0))
    for what, height, width in (
        ("weights", 2 * intermediate, hidden),
        ("weights", hidden, intermediate),
        ("rows", tokens, hidden),
    ):
        case, count = QuantiseCase(what, height, width), experts if what == "weights" else 1
        moved = count * height * width * (4 if what == "weights" else 3)
        rows.append(_timed("fp8 quantise", case, lambda case=case: quantise(case, experts), 0, moved))
    return write("fp8", rows, limits, folder)


def table(record: dict) -> str:
    """A run's products and quantisation, and what they add up to, for a README."""
    products = {
        (row["case"]["depth"], row["case"]["width"], row["case"]["scaling"]): row
        for row in record["rows"]
        if row["op"] == "fp8 product"
    }
    shapes = list(dict.fromkeys((depth, width) for depth, width, _ in products))
    lines = [
        f"{record['device']}, torch {record['versions']['torch']}, {record['date'][:10]}; "
        f"{next(iter(products.values()))['case']['rows']} rows, dense products of cuBLAS, ms (TFLOP/s).",
        "",
        f"| depth x width | {' | '.join(SCALINGS)} |",
        "|---" * (len(SCALINGS) + 1) + "|",
        *(
            f"| {depth} x {width} | {' | '.join(_cell(products[depth, width, each]) for each in SCALINGS)} |"
            for depth, width in shapes
        ),
        "",
    ]
    quantised = [row for row in record["rows"] if row["op"] == "fp8 quantise"]
    lines += [
        f"* quantising {_what(row['case'])}: {row['ms_median']:.2f} ms ({row['gbps']:.0f} GB/s)" for row in quantised
    ]
    times = {each: sum(products[shape + (each,)]["ms_median"] or float("nan") for shape in shapes) for each in SCALINGS}
    weights = times["bfloat16"] / 2  # their gradients: 6 of the 12 T * K * H * I operations above
    of_weights, of_rows = (
        sum(row["ms_median"] for row in quantised if row["case"]["what"] == what) for what in ("weights", "rows")
    )
    rows = of_weights + 2 * of_rows  # x and dout
    before, after = times["bfloat16"] + weights, times["block"] + weights + rows
    later = after - of_weights
    lines += [
        "",
        f"All products of forward and backward: {before:.2f} ms in bf16; {after:.2f} ms with block scales, of which "
        f"{rows:.2f} ms quantise weights, x and dout and {weights:.2f} ms are the weights' gradients in bf16: "
        f"{before / after:.2f} times the speed at best, before anything is quantised in an epilogue. With weights that "
        f"are quantised once for many micro-batches {later:.2f} ms: {before / later:.2f} times.",
    ]
    return "\n".join(lines) + "\n"


def _cell(row: dict) -> str:
    return row["error"] or f"{row['ms_median']:.2f} ({row['tflops']:.0f})"


def _what(case: dict) -> str:
    if case["what"] == "rows":
        return f"{case['height']} rows of {case['width']}"
    return f"the experts' weights [{case['height']}, {case['width']}], both orientations"


def _timed(op: str, case: ProductCase | QuantiseCase, make: Callable, operations: float, moved: float) -> Row:
    try:
        timing = measure(make(), 20, budget_ms=60)
    except RuntimeError as failure:  # cuBLAS has no such product
        return Row(op, asdict(case), "cublas", "forward", error=str(failure)[:200])
    row = Row(
        op, asdict(case), "cublas" if operations else "tilestack-triton", "forward",
        ms_median=timing.median, ms_min=timing.low, ms_max=timing.high,
        tflops=operations / timing.median / 1e9 or None, gbps=moved / timing.median / 1e6 or None,
    )  # fmt: skip
    print(f"{op} {case}: {timing.median:.3f} ms, {row.tflops or 0:.0f} TFLOP/s, {row.gbps or 0:.0f} GB/s", flush=True)
    return row
