"""tilestack: Qwen3-MoE training as fast as the GPU allows, with kernels in Python.

`from tilestack import Qwen3MoeForCausalLM, enable` needs transformers; `import tilestack` alone does not import it.
"""

__version__ = "0.1.0"
__all__ = ["KernelChoice", "Qwen3MoeForCausalLM", "enable"]


def __getattr__(name: str):
    if name not in __all__:
        raise AttributeError(f"module 'tilestack' has no attribute {name!r}")
    import tilestack.models  # late: it imports transformers

    return getattr(tilestack.models, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
