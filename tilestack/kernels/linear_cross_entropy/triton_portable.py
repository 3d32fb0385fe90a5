"""linear_cross_entropy: cuBLAS for the products, Triton for what lies between them, a chunk of tokens at a time.

    logits  = hidden[chunk] @ weight.T               [C, V] in a buffer that every chunk uses again
    dlogits = softmax(logits) - onehot(labels)       in place, with the loss; one program a row
    dhidden[chunk] = dlogits @ weight
    dweight += dlogits.T @ hidden[chunk]             summed in float32

For a scalar loss, forward makes the gradients of the *sum* at once, so that the logits are never made twice; backward
multiplies them by one number on the device. That number is applied late for float16's sake: divided by the number of
tokens first, small gradients would vanish before a loss scale could lift them. For reduction="none" the upstream
gradient differs from token to token, so backward makes the logits again. No atomics: the same input gives the same
bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tilestack.kernels import launch
from tilestack.kernels.dispatch import Call
from tilestack.kernels.linear_cross_entropy import configs
from tilestack.kernels.linear_cross_entropy.reference import check_labels, divisor

AUXILIARY = ("dhidden_sum", "dweight_sum")
SAVED = ("dhidden_sum|hidden", "weight", "labels", "num_items", "dweight_sum")


def refuses(call: Call) -> str | None:
    if call.dtype("hidden") == torch.float64:
        return "has no float64 path"
    return None


@triton.jit
def _logsumexp(logits_ptr, V, BLOCK_V: tl.constexpr):
    """The largest logit of a row, and log(sum(exp(logit - largest))): apart, they lose nothing to rounding."""
    largest = -3.0e38  # finite, so that a block of -inf does not make inf - inf
    total = tl.zeros([BLOCK_V], tl.float32)
    for start in range(0, V, BLOCK_V):
        offs = start + tl.arange(0, BLOCK_V)
        x = tl.load(logits_ptr + offs, mask=offs < V, other=float("-inf")).to(tl.float32)
        larger = tl.maximum(largest, tl.max(x, 0))
        total = total * tl.exp(largest - larger) + tl.exp(x - larger)
        largest = larger
    return largest, tl.log(tl.sum(total, 0))


@triton.jit
def _store_dlogits(logits_ptr, label, largest, log_total, dloss, V, BLOCK_V: tl.constexpr):
    # from the end of the row to its start: what was read last is still in the L2 cache
    n_blocks = tl.cdiv(V, BLOCK_V)
    for block in range(0, n_blocks):
        offs = (n_blocks - 1 - block) * BLOCK_V + tl.arange(0, BLOCK_V)
        x = tl.load(logits_ptr + offs, mask=offs < V, other=float("-inf")).to(tl.float32)
        probability = tl.exp(x - largest - log_total)
        dlogits = tl.where(offs == label, probability - 1.0, probability) * dloss
        tl.store(logits_ptr + offs, dlogits.to(logits_ptr.dtype.element_ty), mask=offs < V)


@triton.jit
def _store_zeros(logits_ptr, V, BLOCK_V: tl.constexpr):
    for start in range(0, V, BLOCK_V):
        offs = start + tl.arange(0, BLOCK_V)
        tl.store(logits_ptr + offs, tl.zeros([BLOCK_V], logits_ptr.dtype.element_ty), mask=offs < V)


@triton.jit
def cross_entropy_kernel(
    logits_ptr, labels_ptr, loss_ptr, dloss_ptr, V, ignore_index,
    HAS_LOSS: tl.constexpr, HAS_DLOSS: tl.constexpr, WITH_DLOGITS: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * V
    label = tl.load(labels_ptr + row)
    if label == ignore_index:
        if HAS_LOSS:
            tl.store(loss_ptr + row, 0.0)
        if WITH_DLOGITS:
            _store_zeros(logits_ptr, V, BLOCK_V)
    else:
        # read before anything is written: the row is overwritten in place
        in_range = (label >= 0) & (label < V)
        chosen = tl.load(logits_ptr + label, mask=in_range, other=float("nan")).to(tl.float32)
        largest, log_total = _logsumexp(logits_ptr, V, BLOCK_V)
        log_total = tl.where(in_range, log_total, float("nan"))
        if HAS_LOSS:
            tl.store(loss_ptr + row, largest - chosen + log_total)
        if WITH_DLOGITS:
            dloss = 1.0
            if HAS_DLOSS:
                dloss = tl.load(dloss_ptr + row)
            _store_dlogits(logits_ptr, label, largest, log_total, dloss, V, BLOCK_V)


@triton.jit
def scale_kernel(sum_ptr, factor_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    scaled = tl.load(sum_ptr + offs, mask=offs < n, other=0.0).to(tl.float32) * tl.load(factor_ptr)
    tl.store(out_ptr + offs, scaled.to(out_ptr.dtype.element_ty), mask=offs < n)


def fake_auxiliary(hidden, weight, labels, num_items, params):
    prepared = params.reduction != "none"
    return (
        hidden.new_empty(hidden.shape if prepared and params.hidden_gradient else (0,)),
        weight.new_empty(weight.shape if prepared and params.weight_gradient else (0,), dtype=torch.float32),
    )


def forward(hidden, weight, labels, num_items, params):
    check_labels(labels, weight.shape[0], params)
    prepared = params.reduction != "none"
    dhidden_sum, dweight_sum = fake_auxiliary(hidden, weight, labels, num_items, params)
    losses = hidden.new_empty(labels.shape, dtype=torch.float32)
    _sweep(
        hidden, weight, labels, params.ignore_index, losses=losses,
        dhidden=dhidden_sum if prepared and params.hidden_gradient else None,
        dweight=dweight_sum if prepared and params.weight_gradient else None,
    )  # fmt: skip
    loss = losses.sum() / divisor(labels, num_items, params, losses.dtype) if prepared else losses
    return loss, dhidden_sum, dweight_sum


def backward(dloss, hidden, weight, labels, num_items, dweight_sum, *, needs, params):
    if params.reduction == "none":
        return _backward_of_each(dloss, hidden, weight, labels, needs, params)
    factor = dloss / divisor(labels, num_items, params, dloss.dtype)
    sums = {"hidden": hidden, "weight": dweight_sum}  # dhidden_sum stands in hidden's place
    return tuple(_scaled(sums[name], factor, weight.dtype) for name in needs)


def _backward_of_each(dloss, hidden, weight, labels, needs, params):
    """Gradients for an upstream gradient that differs from token to token: the logits are made again."""
    dhidden = hidden.new_empty(hidden.shape) if "hidden" in needs else None
    dweight = weight.new_empty(weight.shape, dtype=torch.float32) if "weight" in needs else None
    _sweep(hidden, weight, labels, params.ignore_index, dlosses=dloss.contiguous(), dhidden=dhidden, dweight=dweight)
    found = {"hidden": dhidden, "weight": dweight}
    return tuple(found[name].to(weight.dtype) for name in needs)


def _sweep(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    ignore_index: int,
    *,
    losses: torch.Tensor | None = None,
    dlosses: torch.Tensor | None = None,
    dhidden: torch.Tensor | None,
    dweight: torch.Tensor | None,
) -> None:
    """Make each chunk's logits, turn them into their gradient, and multiply that out.

    losses: [T] float32, written; None in backward. dlosses: [T] float32, the upstream gradient of each token's loss;
    None is 1. dhidden: [T, H], dweight: [V, H] float32: written; None where not wanted.
    """
    if dweight is not None and not hidden.shape[0]:
        dweight.zero_()
    labels = labels.contiguous()
    vocabulary = weight.shape[0]
    buffer = None
    for chunk in configs.chunks(hidden.shape[0], vocabulary, hidden.element_size()):
        rows = hidden[chunk]
        buffer = rows.new_empty((rows.shape[0], vocabulary)) if buffer is None else buffer[: rows.shape[0]]
        torch.mm(rows, weight.T, out=buffer)
        with launch.on_device(buffer):
            cross_entropy_kernel[(rows.shape[0],)](
                buffer, labels[chunk],
                None if losses is None else losses[chunk], None if dlosses is None else dlosses[chunk],
                vocabulary, ignore_index, HAS_LOSS=losses is not None, HAS_DLOSS=dlosses is not None,
                WITH_DLOGITS=dhidden is not None or dweight is not None, **configs.softmax_tile(vocabulary),
            )  # fmt: skip
        if dhidden is not None:
            torch.mm(buffer, weight, out=dhidden[chunk])
        if dweight is not None:
            _add_product(dweight, buffer.T, rows, first=chunk.start == 0)


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, first: bool) -> None:
    """total (float32) += a @ b, or on the first call total = a @ b. Products of bfloat16 are never rounded to it."""
    widening = {}
    if a.dtype != total.dtype:
        if a.is_cuda and torch.version.hip is None:
            widening = {"out_dtype": total.dtype}
        else:  # torch has out_dtype for CUDA alone
            a, b = a.to(total.dtype), b.to(total.dtype)
    if first:
        torch.mm(a, b, out=total, **widening)
    else:
        torch.addmm(total, a, b, out=total, **widening)


def _scaled(total: torch.Tensor, factor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """total * factor in float32, rounded once; `total` stays as it is, for a second backward."""
    out = total.new_empty(total.shape, dtype=dtype)
    if out.numel():
        with launch.on_device(out):
            scale_kernel[(triton.cdiv(out.numel(), configs.SCALE_BLOCK),)](
                total, factor, out, out.numel(), BLOCK=configs.SCALE_BLOCK, num_warps=8
            )
    return out
