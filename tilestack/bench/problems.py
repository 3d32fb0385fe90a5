"""The ops beside attention and the MoE block at 16,384 tokens of Qwen3-30B-A3B, each with its rivals.

A problem names the bytes or floating-point operations that its op cannot do without: what it reads and writes once, or
the products. The rivals are Liger-Kernel, torch.compile over the op's definition, and what torch has of its own. All
get the same tensors; `check` compares every output and gradient with the definition in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch.nn import functional

from tilestack.kernels import adamw, linear_cross_entropy, qk_norm_rope, rms_norm, swiglu
from tilestack.kernels.adamw.op import AdamWParams

TOKENS, HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, HEAD_DIM, VOCABULARY = 16384, 2048, 6144, 32, 4, 128, 151936
EXPERT_PARAMETERS = (32, 1536, 2048)  # of gate_up, a quarter of a layer's experts
EPS = 1e-6
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # the CPU for tests of the problems themselves
STEP = {"step": 7, "lr": 1e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}

Tensors = dict[str, torch.Tensor]
Variant = Callable[[Tensors], tuple[torch.Tensor, ...]]


@dataclass(frozen=True)
class Problem:
    """One op on one set of tensors.

    make: the tensors by name. differentiable: whose gradients are wanted; empty for an op that works in place.
    variants: by implementation, what computes the outputs; the first is the definition that the others are held to.
    bytes, flops: what `forward` and `both` (forward and backward) at least move and compute.
    """

    op: str
    case: dict
    make: Callable[[], Tensors]
    differentiable: tuple[str, ...]
    variants: dict[str, Variant]
    bytes: dict[str, int] = field(default_factory=dict)
    flops: dict[str, int] = field(default_factory=dict)


def _random(*shape: int, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE, dtype=torch.float32).mul_(scale).to(dtype)


def _compiled(function: Variant) -> Variant:
    compiled = torch.compile(function, dynamic=False)
    return lambda tensors: compiled(tensors)


def _norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """transformers' Qwen3MoeRMSNorm."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)).to(x.dtype)


def _rms_norm_definition(t: Tensors) -> tuple[torch.Tensor, ...]:
    summed = t["x"] + t["residual"]
    return _norm(summed, t["weight"]), summed


def _rms_norm_liger(t: Tensors) -> tuple[torch.Tensor, ...]:
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction

    return LigerFusedAddRMSNormFunction.apply(t["x"], t["residual"], t["weight"], EPS)


def rms_norm_problem(tokens: int = TOKENS) -> Problem:
    """The sum with the residual and its norm: four tensors forward, four backward."""
    shape = (tokens, HIDDEN)
    once = 2 * tokens * HIDDEN
    return Problem(
        "rms_norm",
        {"case": f"{tokens} tokens, H {HIDDEN}, with residual", "tokens": tokens},
        lambda: {"x": _random(*shape), "residual": _random(*shape), "weight": _random(HIDDEN)},
        ("x", "residual", "weight"),
        {
            "reference": _rms_norm_definition,
            "tilestack-triton": lambda t: rms_norm(t["x"], t["weight"], residual=t["residual"], eps=EPS),
            "liger": _rms_norm_liger,
            "torch-compile": _compiled(_rms_norm_definition),
        },
        bytes={"forward": 4 * once, "both": 8 * once},
    )


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """transformers' apply_rotary_pos_emb on [B, S, heads, D]."""
    first, second = x.chunk(2, -1)
    return x * cos.unsqueeze(2) + torch.cat((-second, first), -1) * sin.unsqueeze(2)


def _qk_norm_rope_definition(t: Tensors) -> tuple[torch.Tensor, ...]:
    return tuple(_rotate(_norm(t[name], t[f"{name}_weight"]), t["cos"], t["sin"]) for name in ("q", "k"))


def _qk_norm_rope_liger(t: Tensors) -> tuple[torch.Tensor, ...]:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction
    from liger_kernel.ops.rope import LigerRopeFunction

    q, k = (LigerRMSNormFunction.apply(t[name], t[f"{name}_weight"], EPS).transpose(1, 2) for name in ("q", "k"))
    return tuple(each.transpose(1, 2) for each in LigerRopeFunction.apply(q, k, t["cos"], t["sin"]))


def _make_qk(tokens: int) -> Tensors:
    angles = torch.arange(tokens, device=DEVICE)[:, None] * torch.rand(HEAD_DIM // 2, device=DEVICE)[None, :]
    angles = torch.cat((angles, angles), -1)[None]
    return {
        "q": _random(1, tokens, HEADS, HEAD_DIM), "k": _random(1, tokens, KV_HEADS, HEAD_DIM),
        "q_weight": _random(HEAD_DIM), "k_weight": _random(HEAD_DIM),
        "cos": angles.cos().bfloat16(), "sin": angles.sin().bfloat16(),
    }  # fmt: skip


def qk_norm_rope_problem(tokens: int = TOKENS) -> Problem:
    """q and k read and written, in the backward also their gradients; cos and sin once a direction."""
    once = 2 * tokens * HEAD_DIM * (HEADS + KV_HEADS)
    tables = 2 * 2 * tokens * HEAD_DIM
    return Problem(
        "qk_norm_rope",
        {"case": f"{tokens} tokens, {HEADS} and {KV_HEADS} heads of {HEAD_DIM}", "tokens": tokens},
        lambda: _make_qk(tokens),
        ("q", "k", "q_weight", "k_weight"),
        {
            "reference": _qk_norm_rope_definition,
            "tilestack-triton": lambda t: qk_norm_rope(
                t["q"], t["k"], t["q_weight"], t["k_weight"], t["cos"], t["sin"], eps=EPS
            ),
            "liger": _qk_norm_rope_liger,
            "torch-compile": _compiled(_qk_norm_rope_definition),
        },
        bytes={"forward": 2 * once + tables, "both": 5 * once + 2 * tables},
    )


def _swiglu_definition(t: Tensors) -> tuple[torch.Tensor, ...]:
    return (functional.silu(t["gate"]) * t["up"],)


def _swiglu_liger(t: Tensors) -> tuple[torch.Tensor, ...]:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    # its backward writes over gate and up
    return (LigerSiLUMulFunction.apply(t["gate"], t["up"]),)


def swiglu_problem(tokens: int = TOKENS) -> Problem:
    """Three tensors forward, five backward."""
    shape = (tokens, INTERMEDIATE)
    once = 2 * tokens * INTERMEDIATE
    return Problem(
        "swiglu",
        {"case": f"{tokens} tokens, I {INTERMEDIATE}", "tokens": tokens},
        lambda: {"gate": _random(*shape), "up": _random(*shape)},
        ("gate", "up"),
        {
            "reference": _swiglu_definition,
            "tilestack-triton": lambda t: (swiglu(t["gate"], t["up"]),),
            "liger": _swiglu_liger,
            "torch-compile": _compiled(_swiglu_definition),
        },
        bytes={"forward": 3 * once, "both": 8 * once},
    )


def _make_adamw() -> Tensors:
    master = _random(*EXPERT_PARAMETERS, dtype=torch.float32, scale=0.02)
    return {
        "param": master.bfloat16(), "grad": _random(*EXPERT_PARAMETERS, scale=1e-3),
        "exp_avg": _random(*EXPERT_PARAMETERS, dtype=torch.float32, scale=1e-3),
        "exp_avg_sq": _random(*EXPERT_PARAMETERS, dtype=torch.float32, scale=1e-3).square_(), "master": master,
    }  # fmt: skip


def _adamw_definition(t: Tensors) -> tuple[torch.Tensor, ...]:
    """In plain torch, so that torch.compile can make one kernel of it."""
    decay, step_size, correction2_sqrt, _ = AdamWParams(**STEP).scalars()
    g = t["grad"].float()
    exp_avg = STEP["beta1"] * t["exp_avg"] + (1 - STEP["beta1"]) * g
    exp_avg_sq = STEP["beta2"] * t["exp_avg_sq"] + (1 - STEP["beta2"]) * g * g
    master = decay * t["master"] - step_size * exp_avg / (exp_avg_sq.sqrt() / correction2_sqrt + STEP["eps"])
    for name, value in {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "master": master, "param": master}.items():
        t[name].copy_(value)
    return t["param"], t["exp_avg"], t["exp_avg_sq"], t["master"]


def _adamw_ours(t: Tensors) -> tuple[torch.Tensor, ...]:
    adamw(**t, **STEP)
    return t["param"], t["exp_avg"], t["exp_avg_sq"], t["master"]


def _adamw_torch_fused(t: Tensors) -> tuple[torch.Tensor, ...]:
    """torch.optim.AdamW(fused=True) on the master, with the casts that it needs around it."""
    step = torch.full((), float(STEP["step"]), device=DEVICE)
    torch._fused_adamw_(
        [t["master"]], [t["grad"].float()], [t["exp_avg"]], [t["exp_avg_sq"]], [], [step],
        lr=STEP["lr"], beta1=STEP["beta1"], beta2=STEP["beta2"], weight_decay=STEP["weight_decay"], eps=STEP["eps"],
        amsgrad=False, maximize=False,
    )  # fmt: skip
    t["param"].copy_(t["master"])
    return t["param"], t["exp_avg"], t["exp_avg_sq"], t["master"]


def adamw_problem() -> Problem:
    """bf16 gradient and weights, float32 master and moments: 28 bytes a parameter."""
    count = EXPERT_PARAMETERS[0] * EXPERT_PARAMETERS[1] * EXPERT_PARAMETERS[2]
    return Problem(
        "adamw",
        {"case": f"{count / 1e6:.0f}M parameters", "parameters": count},
        _make_adamw,
        (),
        {
            "reference": _adamw_definition,
            "tilestack-triton": _adamw_ours,
            "torch-fused": _adamw_torch_fused,
            "torch-compile": _compiled(_adamw_definition),
        },
        bytes={"forward": 28 * count},
    )


def _make_head(tokens: int) -> Tensors:
    labels = torch.randint(VOCABULARY, (tokens,), device=DEVICE)
    labels[::10] = -100
    return {
        "hidden": _random(tokens, HIDDEN), "weight": _random(VOCABULARY, HIDDEN, scale=0.02), "labels": labels,
    }  # fmt: skip


def _cross_entropy_definition(t: Tensors) -> tuple[torch.Tensor, ...]:
    """Plain logits, as in transformers: bf16 products, float32 loss."""
    return (functional.cross_entropy(functional.linear(t["hidden"], t["weight"]).float(), t["labels"]),)


def _cross_entropy_liger(accumulator: torch.dtype | None) -> Variant:
    def run(t: Tensors) -> tuple[torch.Tensor, ...]:
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

        # bias, class weights, ignore_index, z-loss, smoothing, reduction, softcap, return_z_loss, accum_dtype
        options = (None, None, -100, 0.0, 0.0, "mean", None, False, accumulator)
        return (LigerFusedLinearCrossEntropyFunction.apply(t["hidden"], t["weight"], t["labels"], *options)[0],)

    return run


def _cut_cross_entropy(filter_eps: str | None) -> Variant:
    def run(t: Tensors) -> tuple[torch.Tensor, ...]:
        from cut_cross_entropy import linear_cross_entropy as cut

        return (cut(t["hidden"], t["weight"], t["labels"], filter_eps=filter_eps),)

    return run


def cross_entropy_problem(tokens: int = TOKENS) -> Problem:
    """LM head and loss. Three products; the definition keeps the logits, the rivals make them once or twice."""
    product = 2 * tokens * HIDDEN * VOCABULARY
    return Problem(
        "linear_cross_entropy",
        {"case": f"{tokens} tokens, V {VOCABULARY}, H {HIDDEN}", "tokens": tokens},
        lambda: _make_head(tokens),
        ("hidden", "weight"),
        {
            "plain-logits": _cross_entropy_definition,
            "tilestack-triton": lambda t: (linear_cross_entropy(t["hidden"], t["weight"], t["labels"]),),
            "liger": _cross_entropy_liger(None),
            "liger-float32-sum": _cross_entropy_liger(torch.float32),
            "cut-cross-entropy": _cut_cross_entropy(None),
            "cut-cross-entropy-filtered": _cut_cross_entropy("high"),
        },
        flops={"forward": product, "both": 3 * product},
    )


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "adamw": adamw_problem,
    "linear_cross_entropy": cross_entropy_problem,
    "qk_norm_rope": qk_norm_rope_problem,
    "rms_norm": rms_norm_problem,
    "swiglu": swiglu_problem,
}
