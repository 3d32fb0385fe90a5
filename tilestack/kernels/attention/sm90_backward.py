"""Attention backward for Hopper: the host's part, and the two small kernels around sm90_backward_kernel.py.

`prepare_kernel` writes delta = rowsum(out * dout) and lse in powers of two and clears the float32 sums; a row that sees
no key gets lse = inf: its probabilities are 0 without a mask. `finish_kernel` rounds the sums to dq, dk and dv.
"""

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl

from tilestack.kernels import launch
from tilestack.kernels._gluon import Tiles
from tilestack.kernels.attention.features import sink_gradient
from tilestack.kernels.attention.layout import pad_heads
from tilestack.kernels.attention.sm90_backward_kernel import attention_backward_kernel
from tilestack.kernels.attention.sm90_configs import adds_in_turn, backward_config, backward_section, tile_size
from tilestack.kernels.attention.sm90_schedule import dense_key_table, packed_bound, packed_key_table
from tilestack.kernels.attention.sm90_tiles import RowTiles
from tilestack.kernels.triton_numerics import LOG2E

PREPARE_ROWS = 64
FINISH_ROWS = 64
ALIGNMENT = 128  # numbers of float32 that share no line of the cache with others


@triton.jit
def prepare_kernel(
    out_ptr, dout_ptr, lse_ptr, lse2_ptr, delta_ptr, sums_ptr, stride_out, stride_dout, total_q, length, n_sums,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    heads = tl.num_programs(1)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK_D)
    exists = rows < total_q
    mask = exists[:, None] & (columns < D)[None, :]
    places = rows.to(tl.int64)[:, None]
    out = tl.load(out_ptr + places * stride_out + head * D + columns[None, :], mask=mask, other=0.0)
    dout = tl.load(dout_ptr + places * stride_dout + head * D + columns[None, :], mask=mask, other=0.0)
    of_lse = (rows // length * heads + head).to(tl.int64) * length + rows % length
    lse = tl.load(lse_ptr + of_lse, mask=exists, other=0.0)
    lse2 = tl.where(lse == float("-inf"), float("inf"), lse * LOG2E)
    place = head.to(tl.int64) * total_q + rows
    tl.store(lse2_ptr + place, lse2, mask=exists)
    tl.store(delta_ptr + place, tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1), mask=exists)
    # every program clears its share of the scratch
    CHUNK: tl.constexpr = ROWS * BLOCK_D
    chunk = (head * tl.num_programs(0) + tl.program_id(0)).to(tl.int64)
    for start in range(chunk * CHUNK, n_sums, tl.num_programs(0).to(tl.int64) * heads * CHUNK):
        sums = start + tl.arange(0, CHUNK)
        tl.store(sums_ptr + sums, tl.zeros([CHUNK], tl.float32), mask=sums < n_sums)


@triton.jit
def finish_kernel(
    dq_sum_ptr, dk_sum_ptr, dv_sum_ptr, dq_ptr, dk_ptr, dv_ptr, heads, kv_heads, total_q, total_k, scale, n_dq, n_dkv,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, DQ_COLUMNS: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    if block < n_dq:
        _round_sums(dq_sum_ptr, dq_ptr, block, heads, total_q, scale, D, BLOCK_D, ROWS, DQ_COLUMNS)
    elif block < n_dq + n_dkv:
        _round_sums(dk_sum_ptr, dk_ptr, block - n_dq, kv_heads, total_k, scale, D, BLOCK_D, ROWS, 16)
    else:
        _round_sums(dv_sum_ptr, dv_ptr, block - n_dq - n_dkv, kv_heads, total_k, 1.0, D, BLOCK_D, ROWS, 16)


@triton.jit
def _round_sums(
    sum_ptr, out_ptr, block, heads, total, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """ROWS rows of one head, [heads, total, D] to [total, heads, D]; each COLUMNS in the order of wgmma's registers."""
    n_blocks = tl.cdiv(total, ROWS)
    head = (block // n_blocks).to(tl.int64)
    rows = block % n_blocks * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK_D)
    mask = (rows < total)[:, None] & (columns < D)[None, :]
    sums = tl.load(sum_ptr + ((head * total + rows) * D)[:, None] + columns[None, :], mask=mask, other=0.0) * scale
    values = tl.reshape(sums.to(out_ptr.dtype.element_ty), [ROWS, BLOCK_D // COLUMNS, 4, COLUMNS // 8, 2])
    values = tl.reshape(tl.permute(values, [0, 1, 3, 2, 4]), [ROWS, BLOCK_D])
    tl.store(out_ptr + ((rows.to(tl.int64) * heads + head) * D)[:, None] + columns[None, :], values, mask=mask)


class _Plan:
    """What the calls of one kind have in common on the host's side; tensors are padded to the head dimension of q.

    documents: of packed input, None of dense. sizes: of the pieces of float32 scratch, in numbers: lse in powers of
    two, delta, and the sums of dq, dk and dv.
    """

    def __init__(self, q_shape, k_shape, dtype, device, documents, params):
        heads, head_dim = q_shape[-2:]
        kv_heads, length = k_shape[-2], q_shape[-3]
        group = heads // kv_heads
        in_turn = adds_in_turn(params.deterministic, params.deterministic_keys, group)
        self.config = config = backward_config(head_dim, group, params.softcap > 0, in_turn)
        self.block_m, self.block_n = block_m, block_n = config.BLOCK_M, config.BLOCK_N
        self.table = None
        if documents is None:
            self.table = dense_key_table(q_shape[0], length, k_shape[1], block_m, block_n, device)
            self.n_items = q_shape[0] * launch.cdiv(k_shape[1], block_n)
            n_q_blocks = q_shape[0] * launch.cdiv(length, block_m)
        else:
            self.n_items = packed_bound(k_shape[0], documents, block_n)
            n_q_blocks = packed_bound(length, documents, block_m)
        total_q, total_k = math.prod(q_shape[:-2]), math.prod(k_shape[:-2])
        # a block of rows may reach over the last row: what it adds there is 0
        self.has_sums_of_keys = group > config.HEADS
        aligned = launch.cdiv(heads * total_q, ALIGNMENT) * ALIGNMENT
        sums_of_keys = (kv_heads * total_k + block_n) * head_dim if self.has_sums_of_keys else 0
        self.sizes = aligned, aligned, (heads * total_q + block_m) * head_dim, sums_of_keys, sums_of_keys
        self.n_turns = heads * n_q_blocks + self.n_items * kv_heads if in_turn else 0
        self._tiles(q_shape, k_shape, dtype)
        self._launches(heads, kv_heads, total_q, total_k, length, n_q_blocks, params)

    def _tiles(self, q_shape, k_shape, dtype) -> None:
        config, head_dim = self.config, q_shape[-1]
        self.q_tiles = RowTiles(q_shape, dtype, self.block_m, config.D, config.TAIL)
        self.k_tiles = RowTiles(k_shape, dtype, self.block_n, config.D, config.TAIL)
        lines = (head_dim // 32, self.sizes[2] // head_dim, 32), (32, head_dim, 1), torch.float32
        blocks = [[columns // 32, self.block_m, 32] if columns else None for columns in (config.D, config.TAIL)]
        if config.APART:  # half of dQ at once, the part of a warpgroup
            blocks[0] = [config.D * self.block_m // 4096, 64, 32]
        self.dq_tiles, self.dq_tail_tiles = (
            Tiles(*lines, block) if config.DQ_SHARED and block else None for block in blocks
        )

    def _launches(self, heads, kv_heads, total_q, total_k, length, n_q_blocks, params) -> None:
        config, head_dim = self.config, self.config.D + self.config.TAIL
        columns = {"D": head_dim, "BLOCK_D": launch.next_power_of_2(head_dim)}
        self.prepare = launch.Prepared(
            (launch.cdiv(total_q, PREPARE_ROWS), heads),
            heads * head_dim, heads * head_dim, total_q, length, sum(self.sizes[2:]),
            **columns, ROWS=PREPARE_ROWS, num_warps=4,
        )  # fmt: skip
        scale2 = params.softmax_scale * LOG2E.value
        if params.softcap:  # tanh(x) = 1 - 2 / (1 + exp(2 x))
            scale2 *= 2 / params.softcap
        n_columns = heads // config.HEADS
        self.main = launch.Prepared(
            (self.n_items * n_columns,),
            n_columns, backward_section(n_columns, config.HEADS, length, head_dim), n_q_blocks, total_q, total_k,
            params.window_left, params.window_right, params.softmax_scale, scale2, params.softcap * LOG2E.value,
            kv_heads * head_dim, GROUP=heads // kv_heads, **vars(config),
            HAS_LEFT=params.window_left >= 0, HAS_RIGHT=params.window_right >= 0, HAS_SOFTCAP=params.softcap > 0,
            DETERMINISTIC=self.n_turns > 0, num_warps=8,
        )  # fmt: skip
        n_dq, n_dkv = launch.cdiv(total_q, FINISH_ROWS) * heads, launch.cdiv(total_k, FINISH_ROWS) * kv_heads
        self.finish = launch.Prepared(
            (n_dq + (2 * n_dkv if self.has_sums_of_keys else 0),),
            heads, kv_heads, total_q, total_k, params.softmax_scale, n_dq, n_dkv,
            **columns, ROWS=FINISH_ROWS, DQ_COLUMNS=32 if config.DQ_SHARED else 16, num_warps=4,
        )  # fmt: skip


_plan = functools.lru_cache(maxsize=256)(_Plan)


def backward(dout, dlse, q, k, v, cu_seqlens_q, cu_seqlens_k, sinks, out, lse, *, needs, params):
    """Gradients of the contract; tensors as `refuses` lets them through."""
    if q.numel() == 0 or k.numel() == 0:
        zeros = {"q": q, "k": k, "v": v, "sinks": sinks}
        return tuple(torch.zeros(zeros[name].shape, dtype=zeros[name].dtype, device=q.device) for name in needs)
    head_dim = q.shape[-1]
    size = tile_size(head_dim)
    if size != head_dim:  # zeros change no product
        dout, q, k, v, out = (pad_heads(each, size) for each in (dout, q, k, v, out))
    dq, dk, dv, delta = _gradients(dout, q, k, v, cu_seqlens_q, cu_seqlens_k, out, lse, params)
    found = {"q": dq, "k": dk, "v": dv}
    if size != head_dim:
        found = {name: each[..., :head_dim].contiguous() for name, each in found.items()}
    if "sinks" in needs:
        delta = delta[: lse.numel()].view(q.shape[-2], -1, q.shape[-3]).transpose(0, 1).view(lse.shape)
        found["sinks"] = sink_gradient(sinks, lse, delta)
    return tuple([found[name] for name in needs])


@launch.together
def _gradients(dout, q, k, v, cu_seqlens_q, cu_seqlens_k, out, lse, params):
    """dq, dk, dv, and delta: Hq * queries numbers, and some behind them."""
    documents = None if cu_seqlens_q is None else cu_seqlens_q.numel() - 1
    plan = _plan(q.shape, k.shape, q.dtype, q.device, documents, params)
    items = plan.table
    if items is None:
        items = packed_key_table(cu_seqlens_q, cu_seqlens_k, k.shape[0], plan.n_items, plan.block_m, plan.block_n)
    dq, dk, dv = [torch.empty(each.shape, dtype=each.dtype, device=each.device) for each in (q, k, v)]
    scratch = torch.empty(sum(plan.sizes), dtype=torch.float32, device=q.device)
    lse2, delta, dq_sum, dk_sum, dv_sum = scratch.split_with_sizes(plan.sizes)  # prepare_kernel clears the last three
    dk_desc = dv_desc = None
    if not plan.has_sums_of_keys:
        (dk_desc, _), (dv_desc, _) = plan.k_tiles.of(dk), plan.k_tiles.of(dv)
        dk_sum = dv_sum = dq_sum  # not used
    turns = torch.zeros(plan.n_turns, dtype=torch.int32, device=q.device) if plan.n_turns else None
    dq_desc, dq_tail_desc = (each and each.of(dq_sum) for each in (plan.dq_tiles, plan.dq_tail_tiles))
    dout, out = dout.contiguous(), out.contiguous()
    (q_desc, q_tail), (k_desc, k_tail), (v_desc, v_tail), (dout_desc, dout_tail) = (
        plan.q_tiles.of(q), plan.k_tiles.of(k), plan.k_tiles.of(v), plan.q_tiles.of(dout)
    )  # fmt: skip
    plan.prepare.run(prepare_kernel, out, dout, lse, lse2, delta, dq_sum)
    plan.main.run(
        attention_backward_kernel, q_desc, k_desc, v_desc, dout_desc, q_tail, k_tail, v_tail, dout_tail,
        lse2, delta, dq_desc, dq_tail_desc, dk_desc, dv_desc, dk, dv, dq_sum, dk_sum, dv_sum, turns, items,
    )  # fmt: skip
    plan.finish.run(finish_kernel, dq_sum, dk_sum, dv_sum, dq, dk, dv)
    return dq, dk, dv, delta
