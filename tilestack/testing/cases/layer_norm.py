"""Cases of layer_norm: what may be added, dropped and returned, alone and where two of them meet in a kernel."""

from __future__ import annotations

import torch

from tilestack.kernels import layer_norm
from tilestack.testing.compare import Case, OpCases

WEIGHTS = ("weight", "bias", "weight1", "bias1")
DROP = {"dropout_p": 0.25, "return_dropout_mask": True}


def _make(
    shape: tuple[int, ...],
    *extra: str,
    residual_dtype: torch.dtype | None = None,
    weight_dtype: torch.dtype | None = None,
    strided: bool = False,
    mean: float = 0.0,
):
    """extra: the names of the optional tensors that the call has."""

    def make(dtype, device, generator):
        def random(*size, to=None):
            return (torch.randn(size, generator=generator) + mean).to(device, to or dtype)

        def given(name):
            if name in WEIGHTS:
                return random(shape[-1], to=weight_dtype)
            return (
                random(*shape[:-1])
                if name == "rowscale"
                else random(*shape, to=residual_dtype if name == "residual" else None)
            )

        optional = ("bias", "residual", "x1", "weight1", "bias1", "rowscale")
        x = random(*shape[:-1], 2 * shape[-1])[..., : shape[-1]] if strided else random(*shape)
        tensors = {"x": x, "weight": given("weight")} | {
            name: given(name) if name in extra else None for name in optional
        }
        seed = torch.tensor([2**40 + 7, 3], dtype=torch.int64, device=device) if "dropout" in extra else None
        return tensors | {"dropout_seed": seed}

    return make


def _call(tensors, arguments, implementation):
    found = layer_norm(**tensors, **arguments, implementation=implementation)
    outputs = {name: getattr(found, name) for name in ("out", "out1", "residual_out", "dropout_mask", "dropout_mask1")}
    if found.residual_out is tensors["x"]:
        outputs["residual_out"] = found.residual_out.clone()  # x itself is no output
    return {name: each for name, each in outputs.items() if each is not None}


CASES = OpCases(
    op="layer_norm",
    call=_call,
    differentiable=("x", *WEIGHTS, "residual", "x1"),
    cases=(
        Case("layer norm", "the common case", _make((3, 5, 64), "bias")),
        Case("rms norm", "no mean, no bias", _make((3, 5, 64), "residual"), {"is_rms_norm": True}),
        Case("odd width", "what is masked is not in the variance", _make((7, 67), "bias", "residual", mean=3.0)),
        Case("dropout", "masks, and the gradient through them", _make((6, 40), "bias", "residual", "dropout"), DROP),
        Case("row scale", "stochastic depth", _make((6, 40), "residual", "rowscale"), {"is_rms_norm": True}),
        Case("row scale and dropout", "in this order", _make((6, 40), "bias", "rowscale", "dropout"), DROP),
        Case(
            "parallel block",
            "two addends, two outputs, two masks",
            _make((6, 40), "bias", "residual", "x1", "weight1", "bias1", "dropout"),
            DROP,
        ),
        Case("two outputs of one input", "a second weight alone", _make((6, 40), "weight1"), {"is_rms_norm": True}),
        Case("two addends", "x1 alone", _make((6, 40), "bias", "x1")),
        Case("wide residual", "two dtypes of gradients", _make((6, 40), "residual", residual_dtype=torch.float32)),
        Case("residual in float32", "the first block of a model", _make((6, 40), "bias"), {"residual_in_fp32": True}),
        Case("wide weights", "weights in float32 under x", _make((6, 40), "bias", weight_dtype=torch.float32)),
        Case("output in float32", "out_dtype is not x's", _make((6, 40), "bias"), {"out_dtype": torch.float32}),
        Case("centred at zero", "1 is added to each", _make((6, 40), "weight1"), {"zero_centered_weight": True}),
        Case("one row", "fewer rows than programs", _make((1, 128), "bias")),
        Case("strided", "x is a slice of a wider tensor", _make((3, 5, 64), "bias", strided=True)),
        Case("no rows", "an empty batch", _make((0, 64), "bias", "residual")),
        Case("GPT-3 6.7B", "a real shape", _make((4096, 4096), "bias", "residual"), gpu_only=True),
    ),
)  # fmt: skip
