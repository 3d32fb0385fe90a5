"""cross_entropy in Triton.

One program a row: it goes over the columns once, in blocks, with a running maximum and sum (Milakov and Gimelshein,
"Online normalizer calculation for softmax", 2018), one of each for each thread's columns, joined at the end. Where lse
is known and nothing is smoothed, only the label's logit is read.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tilestack.kernels import launch
from tilestack.kernels.cross_entropy.configs import BLOCK_V, NUM_WARPS
from tilestack.kernels.cross_entropy.op import rows_like
from tilestack.kernels.dispatch import Call

AUXILIARY = ()
SAVED = ()


def refuses(call: Call) -> str | None:
    return "has no float64 path" if call.dtype("logits") == torch.float64 else None


@triton.jit(do_not_specialize=["ignore_index", "class_start", "total_classes"])
def cross_entropy_fwd_kernel(
    logits_ptr, labels_ptr, known_lse_ptr, losses_ptr, z_losses_ptr, lse_ptr, stride,
    label_smoothing, logit_scale, lse_square_scale, ignore_index, class_start, total_classes,
    V, BLOCK_V: tl.constexpr, KNOWN_LSE: tl.constexpr, SMOOTHED: tl.constexpr, IS_SHARD: tl.constexpr,
):  # fmt: skip
    row = tl.cast(tl.program_id(0), tl.int64)
    logits_ptr += row * stride
    label = tl.load(labels_ptr + row)
    column = label - class_start
    is_here = (column >= 0) & (column < V)
    largest = tl.full([BLOCK_V], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_V], tl.float32)
    added = tl.zeros([BLOCK_V], tl.float32)
    if SMOOTHED or not KNOWN_LSE:
        for start in range(0, V, BLOCK_V):
            offs = start + tl.arange(0, BLOCK_V)
            z = tl.load(logits_ptr + offs, mask=offs < V, other=float("-inf")).to(tl.float32) * logit_scale
            z = tl.where(offs < V, z, float("-inf"))  # also where logit_scale is negative
            new_largest = tl.maximum(largest, z)
            finite = tl.where(new_largest == float("-inf"), 0.0, new_largest)
            total = total * tl.exp(largest - finite) + tl.exp(z - finite)
            largest = new_largest
            if SMOOTHED:
                added += tl.where(offs < V, z, 0.0)
    if KNOWN_LSE:
        lse = tl.load(known_lse_ptr + row)
    else:
        row_largest = tl.max(largest, 0)
        finite_largest = tl.where(row_largest == float("-inf"), 0.0, row_largest)
        lse = finite_largest + tl.log(tl.sum(total * tl.exp(largest - finite_largest), 0))
    tl.store(lse_ptr + row, lse)
    target = tl.load(logits_ptr + column, mask=is_here, other=0.0).to(tl.float32) * logit_scale
    common = 0.0 if IS_SHARD else lse
    loss = tl.where(is_here, (1.0 - label_smoothing) * (common - target), 0.0)
    if SMOOTHED:
        loss += label_smoothing * (common - tl.sum(added, 0) / total_classes)
    z_loss = lse_square_scale * common * common
    counts = label != ignore_index
    tl.store(losses_ptr + row, tl.where(counts, loss + z_loss, 0.0))
    tl.store(z_losses_ptr + row, tl.where(counts, z_loss, 0.0))


def forward(logits, labels, lse, params):
    logits = logits if logits.stride(-1) == 1 else logits.contiguous()
    results = [rows_like(logits) for _ in range(3)]
    rows, classes = logits.shape
    if rows:
        with launch.on_device(logits):
            launch.run(
                cross_entropy_fwd_kernel, (rows,),
                logits, labels.contiguous(), results[2] if lse is None else lse.contiguous(), *results,
                logits.stride(0), params.label_smoothing, params.logit_scale, params.lse_square_scale,
                params.ignore_index, params.class_start, params.total_classes, classes,
                BLOCK_V=min(BLOCK_V, launch.next_power_of_2(classes)), KNOWN_LSE=lse is not None,
                SMOOTHED=params.label_smoothing > 0, IS_SHARD=params.is_shard, num_warps=NUM_WARPS,
            )  # fmt: skip
    return tuple(results)
