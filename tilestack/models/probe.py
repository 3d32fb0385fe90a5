"""Which implementation of each op a model would run: the ops are called on tensors without data."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen3MoeConfig

from tilestack import kernels as op
from tilestack.models.kernel_choice import KernelChoice

TOKENS = 128


class _Recorder(TorchDispatchMode):
    """Remembers which custom op of ours ran last."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        namespace, _, name = function._schema.name.partition("::")
        if namespace == "tilestack":
            self.seen = name
        return function(*args, **(kwargs or {}))


def implementations(
    config: Qwen3MoeConfig, kernels: KernelChoice, device: torch.device, dtype: torch.dtype
) -> dict[str, str]:
    """The implementation that the model's shapes, dtype and device would get, by op; "refused: ..." if none takes it.

    config, kernels: the model's. Nothing is computed and no memory is allocated.
    """
    found = {}
    with FakeTensorMode():
        for name, call in _calls(config, kernels, device, dtype).items():
            try:
                with _Recorder() as recorder:
                    call()
                found[name] = _implementation_of(recorder.seen)
            except op.UnsupportedError as refusal:
                found[name] = f"refused: {refusal}"
    return found


def _implementation_of(custom_op: str) -> str:
    name, _, suffix = custom_op.partition("_forward_")
    return next(each.name for each in op.ops()[name].implementations if each.suffix == suffix)


def _calls(c: Qwen3MoeConfig, kernels: KernelChoice, device, dtype) -> dict[str, Callable[[], object]]:
    """One call of each op with the model's shapes."""
    heads, kv_heads, H = c.num_attention_heads, c.num_key_value_heads, c.hidden_size
    D = getattr(c, "head_dim", None) or H // heads
    E, inner, K = c.num_experts, c.moe_intermediate_size, c.num_experts_per_tok

    def new(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        made = torch.empty(shape, device=device, dtype=dtype)
        return made.requires_grad_(made.is_floating_point())

    def attention(packed: bool) -> object:
        q, k, v = (new(1, TOKENS, n, D) for n in (heads, kv_heads, kv_heads))
        extra = {}
        if packed:
            cu_seqlens = new(3, dtype=torch.int32)
            q, k, v = (each.flatten(0, 1) for each in (q, k, v))
            extra = {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens}
        window = (c.sliding_window - 1, 0) if c.sliding_window else (-1, -1)
        return op.attention(q, k, v, causal=True, window_size=window, implementation=kernels.attention, **extra)

    x, ids = new(TOKENS, H), new(TOKENS, K, dtype=torch.int32)
    weights = new(TOKENS, K, dtype=torch.promote_types(dtype, torch.float32))
    dense = new(TOKENS, c.intermediate_size)
    q, k, angles = new(1, TOKENS, heads, D), new(1, TOKENS, kv_heads, D), new(1, TOKENS, D)
    return {
        "rms_norm": lambda: op.rms_norm(x, new(H), residual=x, implementation=kernels.rms_norm),
        "qk_norm_rope": lambda: op.qk_norm_rope(
            q, k, new(D), new(D), angles, angles, implementation=kernels.qk_norm_rope
        ),
        "attention": lambda: attention(packed=False),
        "attention, packed": lambda: attention(packed=True),
        "router": lambda: op.router(new(TOKENS, E), top_k=K, implementation=kernels.router),
        "moe": lambda: op.moe(
            x, new(E, 2 * inner, H), new(E, H, inner), ids, weights,
            implementation=kernels.moe,
        ),
        "swiglu": lambda: op.swiglu(dense, dense, implementation=kernels.swiglu),
        "linear_cross_entropy": lambda: op.linear_cross_entropy(
            x, new(c.vocab_size, H), new(TOKENS, dtype=torch.int64), implementation=kernels.linear_cross_entropy
        ),
    }  # fmt: skip
