"""What `tilestack bench fp8` makes of a run."""

from dataclasses import asdict

from tilestack.bench.fp8 import SCALINGS, ProductCase, QuantiseCase, table
from tilestack.bench.results import Row

SHAPES = ((2048, 1536), (768, 2048), (2048, 768), (1536, 2048))
MS = {"bfloat16": 1.0, "tensor": 0.4, "block": 0.5}


def row(op, case, ms):
    return asdict(Row(op, asdict(case), "cublas", "forward", ms_median=ms, tflops=1.0, gbps=1.0))


def test_the_speed_up_counts_the_weights_gradients_in_bf16_and_every_quantisation():
    rows = [
        row("fp8 product", ProductCase(64, *shape, scaling), MS[scaling]) for shape in SHAPES for scaling in SCALINGS
    ]
    rows += [row("fp8 quantise", QuantiseCase("weights", 1536, 2048), 0.5)]
    rows += [row("fp8 quantise", QuantiseCase("rows", 64, 2048), 0.25)]
    text = table({"device": "a GPU", "versions": {"torch": "2"}, "date": "2026-01-01T00:00", "rows": rows})
    # 4 products and 2 for the weights: 6 ms; then 4 * 0.5 + 2 + 0.5 + 2 * 0.25 = 5 ms
    assert "6.00 ms in bf16; 5.00 ms with block scales" in text and "1.20 times" in text
