"""What each implementation may refuse, said a second time and apart from its own `refuses`.

A test that skipped on any refusal would pass where an implementation refuses what it should take. Here a call has
traits, an implementation lacks some of them, and it must refuse exactly the calls that have one it lacks.
"""

import torch

# (op, implementation) -> the traits it does not take; an implementation that is not named here takes every case
FEATURES = {"softcap", "sinks", "ALiBi", "dropout"}
ODD = "head dimension not a multiple of 8"
LACKS = {
    ("attention", "tilestack"): {"float32", "ALiBi", "dropout"},
    ("attention", "cudnn"): {
        "float32",
        "head dimension over 128",
        "packed",
        "window",
        "uneven causal",
        "empty",
        "length 1",
        ODD,
        *FEATURES,
    },
    ("attention", "sdpa-flash"): {"float32", "packed", "window", "uneven causal", "empty", ODD, *FEATURES},
    ("attention", "sdpa-efficient"): {
        "float32",
        "grouped",
        "packed",
        "window",
        "uneven causal",
        "empty",
        ODD,
        *FEATURES,
    },
    ("attention", "flash-attn-2"): {"float32", "empty", "no document", ODD, "sinks", "ALiBi", "dropout"},
    ("attention", "flash-attn-4"): {"float32", "empty", "no document", ODD, "sinks", "ALiBi", "dropout"},
    ("attention", "xformers"): {
        "float32",
        "head dimension over 128",
        "grouped",
        "window",
        "empty",
        "no document",
        ODD,
        *FEATURES,
    },
    ("moe", "tilestack"): {"float32", "sizes not multiples of 64"},
}


def lacking(op_name: str, implementation: str, tensors: dict, arguments: dict) -> set[str]:
    """The traits of a call that the implementation does not take; empty if it must run it."""
    lacks = LACKS.get((op_name, implementation))
    return lacks & TRAITS[op_name](tensors, arguments) if lacks else set()


def _attention(tensors: dict, arguments: dict) -> set[str]:
    q, k = tensors["q"], tensors["k"]
    left, right = arguments.get("window_size", (-1, -1))
    causal = arguments.get("causal", False) or right == 0
    packed = q.dim() == 3
    found = {
        "float32": q.dtype == torch.float32,
        "head dimension over 128": q.shape[-1] > 128,
        "packed": packed,
        "window": left >= 0 or (right > 0 and not causal),
        "uneven causal": causal and not packed and q.shape[1] != k.shape[1],
        "empty": q.numel() == 0 or k.numel() == 0,
        "no document": packed and len(tensors["cu_seqlens_q"]) == 1,
        "length 1": not packed and 1 in (q.shape[1], k.shape[1]),
        "grouped": q.shape[-2] != k.shape[-2],
        ODD: q.shape[-1] % 8 != 0,
        "softcap": arguments.get("softcap", 0) > 0,
        "sinks": tensors["sinks"] is not None,
        "ALiBi": tensors["alibi_slopes"] is not None,
        "dropout": arguments.get("dropout_p", 0) > 0,
    }
    return {name for name, holds in found.items() if holds}


def _moe(tensors: dict, arguments: dict) -> set[str]:
    _, hidden, intermediate = tensors["down"].shape
    found = {
        "float32": tensors["x"].dtype == torch.float32,
        "sizes not multiples of 64": hidden % 64 != 0 or intermediate % 64 != 0,
    }
    return {name for name, holds in found.items() if holds}


TRAITS = {"attention": _attention, "moe": _moe}
