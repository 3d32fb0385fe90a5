"""`import tilestack.compat.flash_attn.as_flash_attn`: from here on, `flash_attn` is tilestack's in this process.

Importing this module enters tilestack.compat.flash_attn and its submodules in sys.modules under the names of flash-attn
(and flash_attn_2_cuda, its compiled part), so that code which says `from flash_attn import ...` runs as it is. Nothing
is written to the disk and other processes see nothing of it. Import it before anything that imports flash_attn: where
the real package was imported before, this raises ImportError, because half of the program would go on with it.

What flash-attn has and this package leaves out raises an ImportError that says so. flash_attn.cute (flash-attn-4, which
lies in the same folder) is found where it is installed.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import tilestack.compat.flash_attn

_OURS = "tilestack.compat.flash_attn"
_SUBMODULES = (
    "bert_padding",
    "flash_attn_interface",
    "layers",
    "layers.rotary",
    "losses",
    "losses.cross_entropy",
    "ops",
    "ops.activations",
    "ops.triton",
    "ops.triton.cross_entropy",
    "ops.triton.layer_norm",
    "ops.triton.rotary",
)
_EXTENSION = "needs a compiled extension that flash-attn's own wheels lack too"
_MODELS = "is not part of the attention interface; tilestack has its models in tilestack.models"
_LEFT_OUT = {
    "ops.fused_dense": _EXTENSION,
    "ops.layer_norm": f"{_EXTENSION}; flash_attn.ops.triton.layer_norm has the same fusions",
    "ops.rms_norm": f"{_EXTENSION}; flash_attn.ops.triton.layer_norm has RMSNorm and rms_norm_fn",
    "ops.triton.linear": "has no use without flash_attn.ops.triton.mlp",
    "ops.triton.mlp": "is a layer for squared ReLU that nothing else in flash-attn uses",
    "ops.triton.k_activations": "belongs to flash_attn.ops.triton.linear",
    "modules": _MODELS,
    "models": _MODELS,
    "utils": _MODELS,
    "flash_blocksparse_attn_interface": "is a remainder of version 1 that does not work in 2.8.3",
    "flash_blocksparse_attention": "is a remainder of version 1 that does not work in 2.8.3",
}


class _Explain:
    """Finds flash_attn.cute on the disk, and says of what is left out why it is."""

    def __init__(self, installed: Sequence[str]):
        self._installed = installed

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        package, _, inner = name.partition(".")
        if package != "flash_attn":
            return None
        if inner == "cute":
            return importlib.machinery.PathFinder.find_spec(name, self._installed)
        for left_out, reason in _LEFT_OUT.items():
            if inner == left_out or inner.startswith(f"{left_out}."):
                raise ModuleNotFoundError(f"tilestack's flash_attn leaves out {name}: it {reason}", name=name)
        return None


def _modules() -> dict[str, ModuleType]:
    modules = {"flash_attn": tilestack.compat.flash_attn}
    modules |= {f"flash_attn.{each}": importlib.import_module(f"{_OURS}.{each}") for each in _SUBMODULES}
    modules["flash_attn_2_cuda"] = importlib.import_module(f"{_OURS}.flash_attn_2_cuda")
    return modules


def _install() -> None:
    modules = _modules()
    for name, module in modules.items():
        if sys.modules.get(name, module) is not module:
            raise ImportError(
                f"tilestack.compat.flash_attn.as_flash_attn must be imported before {name}, and {name} was imported "
                f"already, from {getattr(sys.modules[name], '__file__', 'somewhere')}; import it first in the program"
            )
    if "flash_attn" in sys.modules:
        return
    spec = importlib.util.find_spec("flash_attn")  # of what is installed, if anything: it is not imported by this
    installed = () if spec is None else tuple(spec.submodule_search_locations or ())
    sys.meta_path.insert(0, _Explain(installed))
    sys.modules.update(modules)


_install()
