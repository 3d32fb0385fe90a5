"""The name of the cache of keys and values: transformers 5.24 renamed `past_key_values` to `cache`.

Our modules say `cache`, take either name, and hand the cache on under the name of the transformers at hand.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable

from transformers.models.qwen3_moe import modeling_qwen3_moe as original

NAMES = ("cache", "past_key_values")
NAME = next(each for each in NAMES if each in inspect.signature(original.Qwen3MoeModel.forward).parameters)


def takes_cache(forward: Callable) -> Callable:
    """A forward with an argument `cache`, which may be given as `past_key_values` as well.

    Raises ValueError if both are given.
    """

    @functools.wraps(forward)
    def renamed(*args, **kwargs):
        if "past_key_values" in kwargs:
            cache = kwargs.pop("past_key_values")
            if cache is not None and kwargs.get("cache") is not None:
                raise ValueError("cache and past_key_values are the same argument; give only one of them")
            kwargs["cache"] = kwargs.get("cache") if cache is None else cache
        return forward(*args, **kwargs)

    return renamed
