"""qk_norm_rope in Triton.

A row is one head of one token; a tile is a block of rows, held as two halves of the head so that rotating a row needs
no exchange between threads. Rows are addressed through the strides of q and k, which are read in place.
Forward: one program a tile, those of q first, then those of k, in one launch.
Backward: a few programs per multiprocessor stride over the tiles of q, then those of k, and keep their shares of the
weights' gradients in float32 registers; weight_shares sums them in a fixed order. 1/rms is computed again, because the
row is loaded anyway.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tilestack.kernels import launch
from tilestack.kernels.dispatch import Call
from tilestack.kernels.qk_norm_rope.configs import MAX_HEAD_DIM, NUM_WARPS, backward_programs, block_rows
from tilestack.kernels.weight_shares import sum_shares

AUXILIARY = ()
SAVED = ("q", "k", "q_weight", "k_weight", "cos", "sin")


def refuses(call: Call) -> str | None:
    head_dim = call.shape("q")[-1]
    if call.dtype("q") == torch.float64:
        return "has no float64 path"
    if head_dim > MAX_HEAD_DIM:
        return f"keeps a head in registers, up to D = {MAX_HEAD_DIM}, got {head_dim}"
    return None


@triton.jit
def _load_halves(ptr, mask, HALF: tl.constexpr):
    first = tl.load(ptr, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(ptr + HALF, mask=mask, other=0.0).to(tl.float32)
    return first, second


@triton.jit
def _store_halves(ptr, first, second, mask, HALF: tl.constexpr):
    tl.store(ptr, first.to(ptr.dtype.element_ty), mask=mask)
    tl.store(ptr + HALF, second.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _locate(
    tile, n_tokens, seqlen, table_stride_b,
    HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    rows = tile * BLOCK_R + tl.arange(0, BLOCK_R)
    offs = tl.arange(0, BLOCK_HALF)
    mask = (rows < n_tokens * HEADS)[:, None] & (offs < HALF)[None, :]
    token = rows // HEADS
    head = tl.cast(rows % HEADS, tl.int64)
    batch = tl.cast(token // seqlen, tl.int64)
    position = tl.cast(token % seqlen, tl.int64)
    table = (batch * table_stride_b + position * (2 * HALF))[:, None] + offs[None, :]
    dense = tl.cast(rows, tl.int64)[:, None] * (2 * HALF) + offs[None, :]
    return batch, position, head, offs, mask, table, dense


@triton.jit
def _strided(batch, position, head, offs, stride_b, stride_s, stride_h):
    return (batch * stride_b + position * stride_s + head * stride_h)[:, None] + offs[None, :]


@triton.jit
def _forward_tile(
    tile, x_ptr, weight_ptr, cos_ptr, sin_ptr, out_ptr, stride_b, stride_s, stride_h, table_stride_b,
    n_tokens, seqlen, eps,
    HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    batch, position, head, offs, mask, table, dense = _locate(
        tile, n_tokens, seqlen, table_stride_b, HEADS, HALF, BLOCK_R, BLOCK_HALF
    )
    x1, x2 = _load_halves(x_ptr + _strided(batch, position, head, offs, stride_b, stride_s, stride_h), mask, HALF)
    cos1, cos2 = _load_halves(cos_ptr + table, mask, HALF)
    sin1, sin2 = _load_halves(sin_ptr + table, mask, HALF)
    weight1, weight2 = _load_halves(weight_ptr + offs, offs < HALF, HALF)
    rstd = tl.rsqrt(tl.sum(x1 * x1 + x2 * x2, 1) / (2 * HALF) + eps)[:, None]
    n1 = x1 * rstd * weight1[None, :]
    n2 = x2 * rstd * weight2[None, :]
    _store_halves(out_ptr + dense, n1 * cos1 - n2 * sin1, n2 * cos2 + n1 * sin2, mask, HALF)


@triton.jit(do_not_specialize=["n_tokens", "seqlen"])
def qk_norm_rope_fwd_kernel(
    q_ptr, k_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, q_out_ptr, k_out_ptr,
    q_stride_b, q_stride_s, q_stride_h, k_stride_b, k_stride_s, k_stride_h, table_stride_b,
    n_tokens, seqlen, eps,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, HALF: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    n_q_tiles = tl.cdiv(n_tokens * Q_HEADS, BLOCK_R)
    if tile < n_q_tiles:
        _forward_tile(
            tile, q_ptr, q_weight_ptr, cos_ptr, sin_ptr, q_out_ptr, q_stride_b, q_stride_s, q_stride_h,
            table_stride_b, n_tokens, seqlen, eps, Q_HEADS, HALF, BLOCK_R, BLOCK_HALF,
        )  # fmt: skip
    else:
        _forward_tile(
            tile - n_q_tiles, k_ptr, k_weight_ptr, cos_ptr, sin_ptr, k_out_ptr, k_stride_b, k_stride_s, k_stride_h,
            table_stride_b, n_tokens, seqlen, eps, K_HEADS, HALF, BLOCK_R, BLOCK_HALF,
        )  # fmt: skip


@triton.jit
def _backward_tiles(
    dout_ptr, x_ptr, weight_ptr, cos_ptr, sin_ptr, dx_ptr, share_ptr,
    dout_stride_b, dout_stride_s, dout_stride_h, stride_b, stride_s, stride_h, table_stride_b, n_tokens, seqlen, eps,
    HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    # n = x * rstd; dn is dout rotated back; g = dn * weight; dx = rstd * (g - n * mean(g * n)); dweight = sum(dn * n)
    offs = tl.arange(0, BLOCK_HALF)
    weight1, weight2 = _load_halves(weight_ptr + offs, offs < HALF, HALF)
    dweight1 = tl.zeros([BLOCK_R, BLOCK_HALF], tl.float32)
    dweight2 = tl.zeros([BLOCK_R, BLOCK_HALF], tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(n_tokens * HEADS, BLOCK_R), tl.num_programs(0)):
        batch, position, head, offs, mask, table, dense = _locate(
            tile, n_tokens, seqlen, table_stride_b, HEADS, HALF, BLOCK_R, BLOCK_HALF
        )
        dout_offs = _strided(batch, position, head, offs, dout_stride_b, dout_stride_s, dout_stride_h)
        dout1, dout2 = _load_halves(dout_ptr + dout_offs, mask, HALF)
        x1, x2 = _load_halves(x_ptr + _strided(batch, position, head, offs, stride_b, stride_s, stride_h), mask, HALF)
        cos1, cos2 = _load_halves(cos_ptr + table, mask, HALF)
        sin1, sin2 = _load_halves(sin_ptr + table, mask, HALF)
        rstd = tl.rsqrt(tl.sum(x1 * x1 + x2 * x2, 1) / (2 * HALF) + eps)[:, None]
        n1, n2 = x1 * rstd, x2 * rstd
        dn1 = dout1 * cos1 + dout2 * sin2
        dn2 = dout2 * cos2 - dout1 * sin1
        dweight1 += dn1 * n1
        dweight2 += dn2 * n2
        g1, g2 = dn1 * weight1[None, :], dn2 * weight2[None, :]
        mean = (tl.sum(g1 * n1 + g2 * n2, 1) / (2 * HALF))[:, None]
        _store_halves(dx_ptr + dense, rstd * (g1 - n1 * mean), rstd * (g2 - n2 * mean), mask, HALF)
    _store_halves(share_ptr + offs, tl.sum(dweight1, 0), tl.sum(dweight2, 0), offs < HALF, HALF)


@triton.jit(do_not_specialize=["n_tokens", "seqlen"])
def qk_norm_rope_bwd_kernel(
    dq_out_ptr, dk_out_ptr, q_ptr, k_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, dq_ptr, dk_ptr, shares_ptr,
    dq_out_stride_b, dq_out_stride_s, dq_out_stride_h, dk_out_stride_b, dk_out_stride_s, dk_out_stride_h,
    q_stride_b, q_stride_s, q_stride_h, k_stride_b, k_stride_s, k_stride_h, table_stride_b, n_tokens, seqlen, eps,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, HALF: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    share_ptr = shares_ptr + tl.program_id(0) * (4 * HALF)  # [programs, q and k, D]
    _backward_tiles(
        dq_out_ptr, q_ptr, q_weight_ptr, cos_ptr, sin_ptr, dq_ptr, share_ptr,
        dq_out_stride_b, dq_out_stride_s, dq_out_stride_h, q_stride_b, q_stride_s, q_stride_h,
        table_stride_b, n_tokens, seqlen, eps, Q_HEADS, HALF, BLOCK_R, BLOCK_HALF,
    )  # fmt: skip
    _backward_tiles(
        dk_out_ptr, k_ptr, k_weight_ptr, cos_ptr, sin_ptr, dk_ptr, share_ptr + 2 * HALF,
        dk_out_stride_b, dk_out_stride_s, dk_out_stride_h, k_stride_b, k_stride_s, k_stride_h,
        table_stride_b, n_tokens, seqlen, eps, K_HEADS, HALF, BLOCK_R, BLOCK_HALF,
    )  # fmt: skip


def _heads(x: torch.Tensor) -> torch.Tensor:
    """x with each head contiguous: x itself, or a copy where its strides forbid it."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _tiles(q: torch.Tensor, k: torch.Tensor) -> tuple[int, dict[str, int]]:
    """The number of tiles of q and k together, and the constants of a launch."""
    batch, seqlen, q_heads, head_dim = q.shape
    half = head_dim // 2
    block_half = launch.next_power_of_2(half)
    rows = block_rows(block_half)
    n_tiles = launch.cdiv(batch * seqlen * q_heads, rows) + launch.cdiv(batch * seqlen * k.shape[2], rows)
    constants = {
        "Q_HEADS": q_heads, "K_HEADS": k.shape[2], "HALF": half,
        "BLOCK_R": rows, "BLOCK_HALF": block_half, "num_warps": NUM_WARPS,
    }  # fmt: skip
    return n_tiles, constants


def _table_stride(cos: torch.Tensor) -> int:
    return 0 if cos.shape[0] == 1 else cos.shape[1] * cos.shape[2]


def forward(q, k, q_weight, k_weight, cos, sin, params):
    q_out, k_out = q.new_empty(q.shape), k.new_empty(k.shape)
    if q.numel() == 0:
        return q_out, k_out
    batch, seqlen = q.shape[:2]
    n_tiles, constants = _tiles(q, k)
    q, k = _heads(q), _heads(k)
    with launch.on_device(q):
        launch.run(
            qk_norm_rope_fwd_kernel, (n_tiles,),
            q, k, q_weight.contiguous(), k_weight.contiguous(), cos.contiguous(), sin.contiguous(), q_out, k_out,
            *q.stride()[:3], *k.stride()[:3], _table_stride(cos), batch * seqlen, seqlen, params.eps, **constants,
        )  # fmt: skip
    return q_out, k_out


def backward(dq_out, dk_out, q, k, q_weight, k_weight, cos, sin, *, needs, params):
    batch, seqlen, _, head_dim = q.shape
    n_tiles, constants = _tiles(q, k)
    n_programs = backward_programs(n_tiles, launch.multiprocessors(q))
    dq, dk = q.new_empty(q.shape), k.new_empty(k.shape)
    shares = q.new_empty((n_programs, 2, head_dim), dtype=torch.float32)
    # an output that nothing flows back from is rare: zeros cost less than a second kernel would
    dq_out = torch.zeros_like(dq) if dq_out is None else _heads(dq_out)
    dk_out = torch.zeros_like(dk) if dk_out is None else _heads(dk_out)
    q, k = _heads(q), _heads(k)
    with launch.on_device(q):
        launch.run(
            qk_norm_rope_bwd_kernel, (n_programs,),
            dq_out, dk_out, q, k, q_weight.contiguous(), k_weight.contiguous(), cos.contiguous(), sin.contiguous(),
            dq, dk, shares, *dq_out.stride()[:3], *dk_out.stride()[:3], *q.stride()[:3], *k.stride()[:3],
            _table_stride(cos), batch * seqlen, seqlen, params.eps, **constants,
        )  # fmt: skip
    found = {"q": dq, "k": dk}
    if "q_weight" in needs or "k_weight" in needs:
        found["q_weight"], found["k_weight"] = sum_shares(shares, q_weight, k_weight)
    return tuple(found[name] for name in needs)
