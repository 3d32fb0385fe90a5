"""Attention backward for Hopper: the host's part, and the two small kernels around sm90_backward_kernel.py.

`prepare_kernel` writes delta = rowsum(out * dout) and lse in powers of two and clears the float32 sums; a row that sees
no key gets lse = inf: its probabilities are 0 without a mask. `finish_kernel` rounds the sums to dq, dk and dv.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tilestack.kernels import launch
from tilestack.kernels._gluon import tensor_descriptor
from tilestack.kernels.attention.features import sink_gradient
from tilestack.kernels.attention.layout import pad_heads, rows_by_heads
from tilestack.kernels.attention.sm90_backward_kernel import attention_backward_kernel
from tilestack.kernels.attention.sm90_configs import adds_in_turn, backward_config, backward_section, tile_size
from tilestack.kernels.attention.sm90_schedule import key_table, query_blocks
from tilestack.kernels.triton_numerics import LOG2E

PREPARE_ROWS = 64
FINISH_ROWS = 64


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


def backward(dout, dlse, q, k, v, cu_seqlens_q, cu_seqlens_k, sinks, out, lse, *, needs, params):
    """Gradients of the contract; tensors as `refuses` lets them through."""
    if q.numel() == 0 or k.numel() == 0:
        zeros = {"q": q, "k": k, "v": v, "sinks": sinks}
        return tuple(torch.zeros(zeros[name].shape, dtype=zeros[name].dtype, device=q.device) for name in needs)
    heads, head_dim = q.shape[-2:]
    size = tile_size(head_dim)
    dout, q, k, v, out = (pad_heads(each, size) for each in (dout, q, k, v, out))  # zeros change no product
    dq, dk, dv, delta = _gradients(dout, q, k, v, cu_seqlens_q, cu_seqlens_k, out, lse, params)
    found = {"q": dq, "k": dk, "v": dv}
    if size != head_dim:
        found = {name: each[..., :head_dim].contiguous() for name, each in found.items()}
    if "sinks" in needs:
        delta = delta.view(heads, -1, q.shape[-3]).transpose(0, 1).view(lse.shape)
        found["sinks"] = sink_gradient(sinks, lse, delta)
    return tuple(found[name] for name in needs)


@launch.together
def _gradients(dout, q, k, v, cu_seqlens_q, cu_seqlens_k, out, lse, params):
    """dq, dk, dv, and delta [Hq, queries]."""
    dq, dk, dv = [torch.empty_like(each, memory_format=torch.contiguous_format) for each in (q, k, v)]
    heads, head_dim = q.shape[-2:]
    kv_heads = k.shape[-2]
    group = heads // kv_heads
    config = backward_config(head_dim, group, params.softcap > 0)
    block_m, block_n = config.BLOCK_M, config.BLOCK_N
    items, n_items = key_table(q, k, cu_seqlens_q, cu_seqlens_k, block_m, block_n)
    n_q_blocks = query_blocks(q, cu_seqlens_q, block_m)
    n_columns = heads // config.HEADS
    length = q.shape[-3]
    total_q, total_k = q.numel() // (heads * head_dim), k.numel() // (kv_heads * head_dim)
    new = {"dtype": torch.float32, "device": q.device}
    lse2, delta = torch.empty(2, heads * total_q, **new)
    # a block of rows may reach over the last row: what it adds there is 0
    sizes = [(heads * total_q + block_m) * head_dim]
    if group > config.HEADS:
        sizes += 2 * [(kv_heads * total_k + block_n) * head_dim]
    sums = torch.empty(sum(sizes), **new)
    dq_sum, *others = sums.split(sizes)
    dk_sum, dv_sum = others or (dq_sum, dq_sum)  # not used
    turns = dq_desc = dq_tail_desc = dk_desc = dv_desc = None
    in_turn = adds_in_turn(params.deterministic, params.deterministic_keys, group)
    if in_turn:
        turns = torch.zeros(heads * n_q_blocks + n_items * kv_heads, dtype=torch.int32, device=q.device)
    if config.DQ_SHARED:
        lines = dq_sum.view(-1, head_dim // 32, 32).transpose(0, 1)
        dq_desc = tensor_descriptor(lines, [config.D // 32, block_m, 32])
        if config.TAIL:
            dq_tail_desc = tensor_descriptor(lines, [config.TAIL // 32, block_m, 32])
    if group == config.HEADS:
        dk_desc, dv_desc = (tensor_descriptor(rows_by_heads(each), [block_n, config.D]) for each in (dk, dv))
    out_rows, *rows = (rows_by_heads(each) for each in (out, q, k, v, dout))
    blocks = (block_m, block_n, block_n, block_m)
    descs = [tensor_descriptor(*each) for each in zip(rows, [[size, config.D] for size in blocks], strict=True)]
    tail_descs = [None] * 4
    if config.TAIL:
        tails = [[size, config.TAIL] for size in blocks]
        tail_descs = [tensor_descriptor(*each, 2 * config.TAIL) for each in zip(rows, tails, strict=True)]
    scale2 = params.softmax_scale * LOG2E.value
    if params.softcap:  # tanh(x) = 1 - 2 / (1 + exp(2 x))
        scale2 *= 2 / params.softcap
    with launch.on_device(q):
        launch.run(
            prepare_kernel, (launch.cdiv(total_q, PREPARE_ROWS), heads),
            out_rows, rows[3], lse, lse2, delta, sums, out_rows.stride(0), rows[3].stride(0),
            total_q, length, sums.numel(), D=head_dim, BLOCK_D=launch.next_power_of_2(head_dim), ROWS=PREPARE_ROWS,
            num_warps=4,
        )  # fmt: skip
        launch.run(
            attention_backward_kernel, (n_items * n_columns,),
            *descs, *tail_descs, lse2, delta, dq_desc, dq_tail_desc, dk_desc, dv_desc, dk, dv,
            dq_sum, dk_sum, dv_sum, turns, items, n_columns,
            backward_section(n_columns, config.HEADS, length, head_dim), n_q_blocks, total_q, total_k,
            params.window_left, params.window_right, params.softmax_scale, scale2, params.softcap * LOG2E.value,
            kv_heads * head_dim, GROUP=group, **vars(config),
            HAS_LEFT=params.window_left >= 0, HAS_RIGHT=params.window_right >= 0, HAS_SOFTCAP=params.softcap > 0,
            DETERMINISTIC=in_turn, num_warps=8,
        )  # fmt: skip
        n_dq, n_dkv = launch.cdiv(total_q, FINISH_ROWS) * heads, launch.cdiv(total_k, FINISH_ROWS) * kv_heads
        launch.run(
            finish_kernel, (n_dq + (2 * n_dkv if group > config.HEADS else 0),),
            dq_sum, dk_sum, dv_sum, dq, dk, dv, heads, kv_heads, total_q, total_k, params.softmax_scale, n_dq, n_dkv,
            D=head_dim, BLOCK_D=launch.next_power_of_2(head_dim), ROWS=FINISH_ROWS,
            DQ_COLUMNS=32 if config.DQ_SHARED else 16, num_warps=4,
        )  # fmt: skip
    return dq, dk, dv, delta
