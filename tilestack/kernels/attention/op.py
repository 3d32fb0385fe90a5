"""Scaled dot-product attention, dense and packed: the contract.

    s[i, j] = softmax_scale * q[i] . k[j]       where query i may see key j, else -inf
    s[i, j] = softcap * tanh(s[i, j] / softcap)                 if there is a soft cap
    s[i, j] = s[i, j] - slope[h] * |i + Sk - Sq - j|            if there are ALiBi slopes
    lse[i] = log(sum_j exp(s[i, j]) + exp(sink[h]))             the last term if there are sinks
    out[i] = sum_j D(exp(s[i, j] - lse[i])) * v[j]              D: dropout

Source: Vaswani et al., "Attention Is All You Need" (2017), eq. 1; grouped queries: Ainslie et al. (2023); soft cap:
Gemma 2 (2024); sinks: gpt-oss (2025); ALiBi: Press et al. (2022); masks, packing and names: flash-attn 2.8.3.
"""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass
from typing import Any

import torch
from torch.compiler import is_compiling

from tilestack.kernels import checks
from tilestack.kernels.attention.dropout import draw_seed
from tilestack.kernels.attention.layout import empty_lse
from tilestack.kernels.attention.vendors import AFTER_TRITON, BEFORE_TRITON
from tilestack.kernels.dispatch import Implementation, Op, portable, reference
from tilestack.kernels.registration import Contract


@dataclass(frozen=True)
class AttentionParams:
    """What is no tensor, normalised: an implementation need not look at the user's spelling.

    causal: exactly window_right == 0.
    window_left, window_right: keys seen to the left and right of the query's own position, less than 2^30; -1 is no
        limit.
    max_seqlen_q, max_seqlen_k: packed input's longest document; -1 is unknown (and in dense input).
    deterministic, deterministic_keys: the same bits each time in all gradients; in dk and dv at least.
    softcap, dropout_p: 0 is none.
    """

    softmax_scale: float
    causal: bool
    window_left: int
    window_right: int
    max_seqlen_q: int
    max_seqlen_k: int
    deterministic: bool
    softcap: float = 0.0
    dropout_p: float = 0.0
    deterministic_keys: bool = False


def _fake(q, k, v, *rest) -> tuple[torch.Tensor, torch.Tensor]:
    return q.new_empty(q.shape), empty_lse(q)


CONTRACT = Contract(
    "attention",
    ("q", "k", "v", "cu_seqlens_q?", "cu_seqlens_k?", "sinks?", "alibi_slopes?", "dropout_seed?"),
    ("out", "lse"),
    AttentionParams,
    _fake,
    constants=("lse",),
)
HOPPER = Implementation(
    "tilestack",
    "tilestack.kernels.attention.sm90_gluon",
    "sm90",
    min_capability=90,
    max_capability=90,
    packages=("triton",),
)
OP = Op(CONTRACT, (HOPPER, *BEFORE_TRITON, portable("attention"), *AFTER_TRITON, reference("attention")))


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: torch.Tensor | None = None,
    deterministic: bool | str = False,
    return_lse: bool = False,
    implementation: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention of every query over the keys that it may see.

    q: dense [B, Sq, Hq, D] or packed [Tq, Hq, D], floating point; any strides.
    k, v: dense [B, Sk, Hkv, D] or packed [Tk, Hkv, D], the dtype of q. Hq is a multiple of Hkv: query head h reads
        key head h // (Hq / Hkv).
    causal: query i of a sequence sees no key after i + Sk - Sq (aligned at the bottom right).
    softmax_scale: multiplies the scores, more than 0; None is D ** -0.5.
    window_size: (left, right): query i sees keys j with i + Sk - Sq - left <= j <= i + Sk - Sq + right; -1 is no
        limit. With causal, right is 0.
    cu_seqlens_q, cu_seqlens_k: packed input only: where each document begins, then the end: int32 [n + 1], on the
        device of q, starting with 0. A document may be empty. Values are never read on the host, so they are not
        checked; rows after the last offset belong to no document.
    max_seqlen_q, max_seqlen_k: packed input only: no document is longer; None is unknown. Our kernels choose a tile by
        that of q, one for long documents if it is unknown; other libraries launch thread blocks for such lengths.
    softcap: more than 0: scores are softcap * tanh(score / softcap), before ALiBi and the mask; 0 is none.
    sinks: [Hq], floating point: each head's logit of one more key, which every query sees and whose value is 0.
        Differentiable.
    alibi_slopes: [Hq], or [B, Hq] (packed: [documents, Hq]), float32 (float64 for float64 input): scores are
        lessened by slope * |i + Sk - Sq - j|. No gradient flows to them.
    dropout_p: in [0, 1): this share of the probabilities is dropped, the rest divided by 1 - dropout_p. lse is that of
        all keys.
    dropout_seed: int64 [2], (seed, offset), on the device of q: fixes what is dropped (dropout.py says how). None draws
        it from the device's default generator, so that torch.manual_seed fixes it.
    deterministic: True: the gradients must have the same bits each time. "keys": those of k and v must, which is what
        flash-attn promises by itself. It costs time where an implementation adds to them in no fixed order.
    return_lse: also return the log-sum-exp.
    implementation: a name of `tilestack.kernels.ops()["attention"].implementations`; None chooses.

    Returns `out` like q, or `(out, lse)`: lse is [B, Hq, Sq] or [Hq, Tq], float32 (float64 for float64 input), and
    carries no gradient. A query that sees no key gives out = 0, zero gradients, and lse = -inf,
    or its head's sink.
    Raises ValueError for wrong shapes, dtypes, devices or numbers.
    """
    tensors, params = _prepare(
        q, k, v, causal=causal, softmax_scale=softmax_scale, window_size=window_size, cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k, max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k, softcap=softcap, sinks=sinks,
        alibi_slopes=alibi_slopes, dropout_p=dropout_p, dropout_seed=dropout_seed, deterministic=deterministic,
    )  # fmt: skip
    out, lse = OP(tensors, params, implementation)
    return (out, lse) if return_lse else out


def attention_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    *,
    implementation: str | None = None,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of a forward pass that autograd did not record, as in ring attention.

    dout, out: like q. lse: as `attention` returns it. Both may be those of more keys than k has: of all parts of a
        sequence whose keys are spread over several tensors. Then dq is this part's share of a sum.
    options: those of `attention`, but return_lse. With dropout, dropout_seed is that of the forward pass.

    Returns (dq, dk, dv). Nothing is recorded by autograd. Raises ValueError as `attention` does.
    """
    if options.get("dropout_p") and options.get("dropout_seed") is None:
        raise ValueError("attention: dropout_seed is missing: backward must drop what the forward pass dropped")
    tensors, params = _prepare(q, k, v, **options)
    for name, each in (("dout", dout), ("out", out)):
        checks.shape("attention", name, each, tuple(q.shape), "the shape of q")
        checks.same_dtype("attention", **{"q": q, name: each})
    *batch, length, heads, _ = q.shape
    checks.shape("attention", "lse", lse, (*batch, heads, length), "[B, Hq, Sq], or packed [Hq, Tq]")
    checks.dtype("attention", "lse", lse, torch.promote_types(q.dtype, torch.float32))
    checks.same_device("attention", q=q, dout=dout, out=out, lse=lse)
    named = dict(zip(CONTRACT.input_names, tensors, strict=True)) | {"out": out.contiguous(), "lse": lse.contiguous()}
    with torch.no_grad():
        return tuple(OP.backward((dout, None), named, params, ("q", "k", "v"), implementation))


def _prepare(
    q, k, v, *, causal=False, softmax_scale=None, window_size=(-1, -1), cu_seqlens_q=None, cu_seqlens_k=None,
    max_seqlen_q=None, max_seqlen_k=None, softcap=0.0, sinks=None, alibi_slopes=None, dropout_p=0.0, dropout_seed=None,
    deterministic=False,
) -> tuple[tuple[torch.Tensor | None, ...], AttentionParams]:  # fmt: skip
    """Check the arguments of `attention`; the op's tensors and parameters."""
    optional = (cu_seqlens_q, cu_seqlens_k, sinks, alibi_slopes, dropout_seed)
    numbers = (causal, softmax_scale, window_size, max_seqlen_q, max_seqlen_k, softcap, dropout_p, deterministic)
    key = _seen_by_checks((q, k, v, *optional), numbers)
    params = _CHECKED.get(key)
    if params is None:
        params = _checked(q, k, v, *optional, *numbers)
        if key is not None:
            if len(_CHECKED) >= _MOST_CHECKED:
                _CHECKED.clear()
            _CHECKED[key] = params
    if alibi_slopes is not None:
        alibi_slopes = alibi_slopes.detach()
    if not dropout_p:
        dropout_seed = None
    elif dropout_seed is None:
        dropout_seed = draw_seed(q.device)
    optional = (cu_seqlens_q, cu_seqlens_k, sinks, alibi_slopes, dropout_seed)
    return (q, k, v, *[None if each is None else each.contiguous() for each in optional]), params


_CHECKED: dict[tuple | None, AttentionParams] = {}  # arguments that were right, and what they mean
_MOST_CHECKED = 4096  # packed batches have new shapes at each step


def _seen_by_checks(tensors: tuple, numbers: tuple) -> tuple | None:
    """All that the checks look at, so that they need not look again; None where that cannot be kept."""
    window_size = numbers[2]
    if is_compiling() or type(window_size) is not tuple:
        return None
    try:
        kinds = [None if each is None else (type(each), each.shape, each.dtype, each.device) for each in tensors]
        key = (*kinds, *numbers, *map(type, numbers), *map(type, window_size))  # 1, 1.0 and True are equal keys
        hash(key)
    except (AttributeError, TypeError):  # not a tensor, or not a number
        return None
    return key


def _checked(
    q, k, v, cu_seqlens_q, cu_seqlens_k, sinks, alibi_slopes, dropout_seed,
    causal, softmax_scale, window_size, max_seqlen_q, max_seqlen_k, softcap, dropout_p, deterministic,
) -> AttentionParams:  # fmt: skip
    optional = {
        "cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k, "sinks": sinks, "alibi_slopes": alibi_slopes,
        "dropout_seed": dropout_seed,
    }  # fmt: skip
    checks.tensors("attention", q=q, k=k, v=v, **{name: each for name, each in optional.items() if each is not None})
    _check_tensors(q, k, v)
    if not isinstance(deterministic, bool) and deterministic != "keys":
        raise ValueError(f"attention: deterministic must be True, False or 'keys', got {deterministic!r}")
    _check_packing(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    _check_scores(q, cu_seqlens_q, softcap, sinks, alibi_slopes)
    _check_dropout(q, dropout_p, dropout_seed)
    left, right = _window(window_size, causal)
    return AttentionParams(
        softmax_scale=_scale(softmax_scale, q.shape[-1]),
        causal=right == 0,
        window_left=left,
        window_right=right,
        max_seqlen_q=-1 if max_seqlen_q is None else max_seqlen_q,
        max_seqlen_k=-1 if max_seqlen_k is None else max_seqlen_k,
        deterministic=deterministic is True,
        softcap=float(softcap),
        dropout_p=float(dropout_p),
        deterministic_keys=bool(deterministic),
    )


def _check_tensors(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    checks.floating("attention", q=q)
    checks.same_dtype("attention", q=q, k=k, v=v)
    checks.same_device("attention", q=q, k=k, v=v)
    checks.rank("attention", "q", q, (3, 4), "[B, Sq, Hq, D], or packed [Tq, Hq, D]")
    checks.rank("attention", "k", k, (q.dim(),), "[B, Sk, Hkv, D] like q, or packed [Tk, Hkv, D]")
    heads, head_dim = q.shape[-2:]
    kv_heads = k.shape[-2]
    checks.at_least("attention", "the head dimension of q", head_dim, 1)
    checks.shape("attention", "k", k, (*k.shape[:-1], head_dim), "the head dimension of q")
    checks.shape("attention", "v", v, tuple(k.shape), "the shape of k")
    if q.dim() == 4:
        checks.shape("attention", "k", k, (q.shape[0], *k.shape[1:]), "the batch size of q")
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"attention: q must have a multiple of the heads of k ({kv_heads}), got {heads}")


def _check_packing(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k) -> None:
    packed = q.dim() == 3
    for side, tensor, cu_seqlens, max_seqlen in (
        ("q", q, cu_seqlens_q, max_seqlen_q),
        ("k", k, cu_seqlens_k, max_seqlen_k),
    ):
        if packed and cu_seqlens is None:
            raise ValueError(f"attention: cu_seqlens_{side} is missing: packed {side} {list(tensor.shape)} needs it")
        if not packed:
            _check_absent(f"cu_seqlens_{side}", cu_seqlens, q)
            _check_absent(f"max_seqlen_{side}", max_seqlen, q)
            continue
        checks.dtype("attention", f"cu_seqlens_{side}", cu_seqlens, torch.int32)
        checks.same_device("attention", **{"q": q, f"cu_seqlens_{side}": cu_seqlens})
        checks.rank("attention", f"cu_seqlens_{side}", cu_seqlens, (1,), "[n + 1]")
        checks.at_least("attention", f"the length of cu_seqlens_{side}", cu_seqlens.numel(), 1)
        if max_seqlen is not None:
            _check_integer(f"max_seqlen_{side}", max_seqlen)
            checks.at_least("attention", f"max_seqlen_{side}", max_seqlen, 0)
    if packed:
        checks.shape("attention", "cu_seqlens_k", cu_seqlens_k, tuple(cu_seqlens_q.shape), "as many as cu_seqlens_q")


def _check_scores(q, cu_seqlens_q, softcap, sinks, alibi_slopes) -> None:
    _check_number("softcap", softcap)
    if not 0 <= softcap < math.inf:
        raise ValueError(f"attention: softcap must be a finite number, 0 (none) or more, got {softcap!r}")
    heads = q.shape[-2]
    if sinks is not None:
        checks.floating("attention", sinks=sinks)
        checks.same_device("attention", q=q, sinks=sinks)
        checks.shape("attention", "sinks", sinks, (heads,), "one for each head of q")
    if alibi_slopes is not None:
        checks.dtype("attention", "alibi_slopes", alibi_slopes, torch.promote_types(torch.float32, q.dtype))
        checks.same_device("attention", q=q, alibi_slopes=alibi_slopes)
        checks.rank("attention", "alibi_slopes", alibi_slopes, (1, 2), "[Hq], [B, Hq] or packed [documents, Hq]")
        sequences = q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.numel() - 1
        expected = (heads,) if alibi_slopes.dim() == 1 else (sequences, heads)
        checks.shape("attention", "alibi_slopes", alibi_slopes, expected, "the heads of q, for all sequences or each")


def _check_dropout(q: torch.Tensor, dropout_p: float, dropout_seed: torch.Tensor | None) -> None:
    _check_number("dropout_p", dropout_p)
    if not 0 <= dropout_p < 1:
        raise ValueError(f"attention: dropout_p must be at least 0 and less than 1, got {dropout_p!r}")
    if dropout_seed is not None:
        checks.dtype("attention", "dropout_seed", dropout_seed, torch.int64)
        checks.same_device("attention", q=q, dropout_seed=dropout_seed)
        checks.shape("attention", "dropout_seed", dropout_seed, (2,), "seed and offset")


def _check_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"attention: {name} must be a number, got {type(value).__name__}")


def _check_absent(name: str, value: object, q: torch.Tensor) -> None:
    if value is not None:
        raise ValueError(
            f"attention: {name} belongs to packed input, q [Tq, Hq, D], but q is {list(q.shape)}; "
            f"drop {name}, or flatten the batch"
        )


def _check_integer(name: str, value: object) -> None:
    # numbers.Integral: also numpy's; torch.compile gives its own
    if isinstance(value, bool) or not isinstance(value, (numbers.Integral, torch.SymInt)):
        raise ValueError(f"attention: {name} must be an integer, got {type(value).__name__}")


_NO_LIMIT = 2**30  # kernels add positions to a window in 32 bits; no sequence is as long


def _window(window_size: tuple[int, int], causal: bool) -> tuple[int, int]:
    if not isinstance(window_size, (tuple, list)) or len(window_size) != 2:
        raise ValueError(f"attention: window_size must be two integers, (left, right), got {window_size!r}")
    for value in window_size:
        _check_integer("window_size", value)
        checks.at_least("attention", "window_size", value, -1)
    left, right = (-1 if value >= _NO_LIMIT else value for value in window_size)
    return left, 0 if causal else right


def _scale(softmax_scale: float | None, head_dim: int) -> float:
    if softmax_scale is None:
        return head_dim**-0.5
    if isinstance(softmax_scale, (torch.Tensor, str)) or not 0 < softmax_scale < math.inf:
        raise ValueError(f"attention: softmax_scale must be a finite number greater than 0, got {softmax_scale!r}")
    return float(softmax_scale)
