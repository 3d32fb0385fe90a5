"""linear_cross_entropy: cuBLAS for the products, Triton for what lies between them, a chunk of tokens at a time.

    logits  = hidden[chunk] @ weight.T               [C, V] in a buffer that every chunk uses again
    dlogits = softmax(logits) - onehot(labels)       in place, with the loss; a program reads a piece of a row
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
SAVED = ("dhidden_sum|hidden", "weight", "labels", "num_items", "token_weights", "weight_gradient_sum", "dweight_sum")


def refuses(call: Call) -> str | None:
    if call.dtype("hidden") == torch.float64:
        return "has no float64 path"
    return None


@triton.jit
def _tanh(x):
    small = x * x
    series = x * (1 + small * (-1 / 3 + small * (2 / 15 + small * (-17 / 315 + small * (62 / 2835)))))
    size = 1 - 2 / (tl.exp(2 * tl.abs(x)) + 1)  # loses relative precision near 0, where the series has it
    return tl.where(small < 0.0625, series, tl.where(x < 0, -size, size))


@triton.jit
def _load_logits(logits_ptr, offs, mask, softcap, SOFTCAP: tl.constexpr):
    """Logits of a row and, with a softcap, tanh(raw / softcap), whose square its derivative needs."""
    x = tl.load(logits_ptr + offs, mask=mask, other=float("-inf")).to(tl.float32)
    squashed = x
    if SOFTCAP:
        squashed = _tanh(x / softcap)
        x = tl.where(mask, squashed * softcap, float("-inf"))
    return x, squashed


UNSAID = tl.constexpr(-1)  # of a word: two NaN of a pattern that no arithmetic makes


@triton.jit
def _pack(largest, total):
    """Two float32 in one int64, which is written and read in one piece."""
    high = largest.to(tl.int32, bitcast=True).to(tl.int64) << 32
    return high | (total.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF)


@triton.jit
def _unpack(words):
    high = (words >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    low = (words & 0xFFFFFFFF).to(tl.int32).to(tl.float32, bitcast=True)
    return high, low


@triton.jit
def _wait(words_ptr, places, mask):
    """What the other programs have said of their pieces of a row, once all of them have."""
    words = tl.load(words_ptr + places, mask=mask, other=0, volatile=True)
    while tl.sum((words == UNSAID).to(tl.int32), 0) > 0:
        words = tl.load(words_ptr + places, mask=mask, other=0, volatile=True)
    return _unpack(words)


@triton.jit
def _say_piece(
    logits_ptr, said_ptr, piece, V, n_pieces, softcap,
    SMOOTHING: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """The largest logit of a piece and the sum of exp(logit - largest); with smoothing also the sum of its logits."""
    offs = piece * BLOCK_V + tl.arange(0, BLOCK_V)
    x, _ = _load_logits(logits_ptr, offs, offs < V, softcap, SOFTCAP)
    largest = tl.maximum(tl.max(x, 0), -3.0e38)  # finite, so that a piece of -inf does not make inf - inf
    total = tl.sum(tl.exp(x - largest), 0)
    tl.store(said_ptr + piece, _pack(largest, total))
    if SMOOTHING:
        sum_x = tl.sum(tl.where(offs < V, x, 0.0), 0)
        tl.store(said_ptr + n_pieces + piece, _pack(sum_x, sum_x))


@triton.jit
def _logsumexp(said_ptr, V, n_pieces, SMOOTHING: tl.constexpr, BLOCK_P: tl.constexpr):
    """The largest logit of a row, log(sum(exp(logit - largest))): apart, they lose nothing to rounding; their mean."""
    places = tl.arange(0, BLOCK_P)
    mask = places < n_pieces
    maxima, totals = _wait(said_ptr, places, mask)
    largest = tl.max(tl.where(mask, maxima, -3.0e38), 0)
    total = tl.sum(tl.where(mask, totals * tl.exp(maxima - largest), 0.0), 0)
    mean = 0.0
    if SMOOTHING:
        sums, _ = _wait(said_ptr + n_pieces, places, mask)
        mean = tl.sum(tl.where(mask, sums, 0.0), 0) / V
    return largest, tl.log(total), mean


@triton.jit
def _finish_piece(
    logits_ptr, said_ptr, label, piece, weight, loss_ptr, dloss_ptr, row, V, n_pieces, smoothing, z_loss, softcap,
    HAS_LOSS: tl.constexpr, HAS_DLOSS: tl.constexpr, WITH_DLOGITS: tl.constexpr,
    SMOOTHING: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    in_range = (label >= 0) & (label < V)
    offs = piece * BLOCK_V + tl.arange(0, BLOCK_V)
    has_label = piece == tl.where(in_range, label // BLOCK_V, 0)
    # read before anything is written: the row is overwritten in place, the label's piece by this program alone
    chosen, _ = _load_logits(logits_ptr, label, in_range & has_label, softcap, SOFTCAP)
    largest, log_total, mean = _logsumexp(said_ptr, V, n_pieces, SMOOTHING, BLOCK_P)
    log_total = tl.where(in_range, log_total, float("nan"))
    lse = largest + log_total
    if HAS_LOSS:
        loss = largest - chosen + log_total
        if SMOOTHING:
            loss = (1 - smoothing) * loss + smoothing * (largest - mean + log_total)
        tl.store(loss_ptr + row, (loss + z_loss * lse * lse) * weight, mask=has_label)
    if WITH_DLOGITS:
        dloss = weight
        if HAS_DLOSS:
            dloss *= tl.load(dloss_ptr + row)
        x, squashed = _load_logits(logits_ptr, offs, offs < V, softcap, SOFTCAP)
        dlogits = tl.exp(x - largest - log_total) * (1 + 2 * z_loss * lse)
        if SMOOTHING:
            dlogits -= smoothing / V
        dlogits = tl.where(offs == label, dlogits - (1 - smoothing), dlogits) * dloss
        if SOFTCAP:
            dlogits *= (1 - squashed) * (1 + squashed)
        tl.store(logits_ptr + offs, dlogits.to(logits_ptr.dtype.element_ty), mask=offs < V)


@triton.jit
def cross_entropy_kernel(
    logits_ptr, labels_ptr, token_weights_ptr, loss_ptr, dloss_ptr, said_ptr, rows, V, n_pieces, lag,
    ignore_index, smoothing, z_loss, softcap,
    HAS_WEIGHTS: tl.constexpr, HAS_LOSS: tl.constexpr, HAS_DLOSS: tl.constexpr, WITH_DLOGITS: tl.constexpr,
    SMOOTHING: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    # A row is read twice, for its log-sum-exp and for dlogits. Each program reads a piece of row `slot` and says what
    # it found, then finishes its piece of row `slot - lag`, which is still in the L2 cache. It waits for what programs
    # of lower numbers say first of all; programs start in the order of their numbers, so those are running or done.
    slot = tl.program_id(0) // n_pieces
    piece = tl.program_id(0) % n_pieces
    words = n_pieces * (1 + SMOOTHING)
    if tl.load(labels_ptr + slot, mask=slot < rows, other=ignore_index) != ignore_index:
        row = slot.to(tl.int64)
        _say_piece(
            logits_ptr + row * V, said_ptr + row * words, piece, V, n_pieces, softcap, SMOOTHING, SOFTCAP, BLOCK_V
        )
    if slot >= lag:
        row = (slot - lag).to(tl.int64)
        label = tl.load(labels_ptr + row)
        if label == ignore_index:
            if HAS_LOSS:
                tl.store(loss_ptr + row, 0.0)
            if WITH_DLOGITS:
                offs = piece * BLOCK_V + tl.arange(0, BLOCK_V)
                zeros = tl.zeros([BLOCK_V], logits_ptr.dtype.element_ty)
                tl.store(logits_ptr + row * V + offs, zeros, mask=offs < V)
        else:
            weight = 1.0
            if HAS_WEIGHTS:
                weight = tl.load(token_weights_ptr + row)
            _finish_piece(
                logits_ptr + row * V, said_ptr + row * words, label, piece, weight, loss_ptr, dloss_ptr, row,
                V, n_pieces, smoothing, z_loss, softcap,
                HAS_LOSS, HAS_DLOSS, WITH_DLOGITS, SMOOTHING, SOFTCAP, BLOCK_V, BLOCK_P,
            )  # fmt: skip


@triton.jit
def scale_kernel(sum_ptr, factor_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    scaled = tl.load(sum_ptr + offs, mask=offs < n, other=0.0).to(tl.float32) * tl.load(factor_ptr)
    tl.store(out_ptr + offs, scaled.to(out_ptr.dtype.element_ty), mask=offs < n)


def fake_auxiliary(hidden, weight, labels, num_items, token_weights, weight_gradient_sum, params):
    prepared = params.reduction != "none"
    return (
        hidden.new_empty(hidden.shape if prepared and params.hidden_gradient else (0,)),
        weight.new_empty(weight.shape if prepared and params.weight_gradient else (0,), dtype=torch.float32),
    )


def forward(hidden, weight, labels, num_items, token_weights, weight_gradient_sum, params):
    check_labels(labels, weight.shape[0], params)
    prepared = params.reduction != "none"
    dhidden_sum, dweight_sum = fake_auxiliary(
        hidden, weight, labels, num_items, token_weights, weight_gradient_sum, params
    )
    losses = hidden.new_empty(labels.shape, dtype=torch.float32)
    _sweep(
        hidden, weight, labels, token_weights, params, losses=losses,
        dhidden=dhidden_sum if prepared and params.hidden_gradient else None,
        dweight=dweight_sum if prepared and params.weight_gradient else None,
    )  # fmt: skip
    if not prepared:
        return losses, losses.new_empty(0), dhidden_sum, dweight_sum
    loss = losses.sum() / divisor(labels, num_items, params, losses.dtype)
    return loss, losses, dhidden_sum, dweight_sum


def backward(
    dloss, _, hidden, weight, labels, num_items, token_weights, weight_gradient_sum, dweight_sum, *, needs, params
):  # fmt: skip
    if params.reduction == "none":
        return _backward_of_each(dloss, hidden, weight, labels, token_weights, weight_gradient_sum, needs, params)
    factor = dloss / divisor(labels, num_items, params, dloss.dtype)
    if weight_gradient_sum is not None:
        weight_gradient_sum.addcmul_(dweight_sum, factor)
    sums = {"hidden": hidden, "weight": dweight_sum}  # dhidden_sum stands in hidden's place
    return tuple(_scaled(sums[name], factor, weight.dtype) for name in needs)


def _backward_of_each(dloss, hidden, weight, labels, token_weights, weight_gradient_sum, needs, params):
    """Gradients for an upstream gradient that differs from token to token: the logits are made again."""
    dhidden = hidden.new_empty(hidden.shape) if "hidden" in needs else None
    dweight = weight.new_zeros(weight.shape, dtype=torch.float32) if "weight" in needs else weight_gradient_sum
    _sweep(
        hidden, weight, labels, token_weights, params, dlosses=dloss.contiguous(), dhidden=dhidden, dweight=dweight,
        add=True,
    )  # fmt: skip
    found = {"hidden": dhidden, "weight": dweight}
    return tuple(found[name].to(weight.dtype) for name in needs)


def _sweep(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    token_weights: torch.Tensor | None,
    params,
    *,
    losses: torch.Tensor | None = None,
    dlosses: torch.Tensor | None = None,
    dhidden: torch.Tensor | None,
    dweight: torch.Tensor | None,
    add: bool = False,
) -> None:
    """Make each chunk's logits, turn them into their gradient, and multiply that out.

    losses: [T] float32, written; None in backward. dlosses: [T] float32, the upstream gradient of each token's loss;
    None is 1. dhidden: [T, H], dweight: [V, H] float32: written, or dweight added to; None where not wanted.
    """
    if dweight is not None and not hidden.shape[0] and not add:
        dweight.zero_()
    labels = labels.contiguous()
    token_weights = None if token_weights is None else token_weights.contiguous()
    vocabulary = weight.shape[0]
    buffer = None
    for chunk in configs.chunks(hidden.shape[0], vocabulary, hidden.element_size()):
        rows = hidden[chunk]
        buffer = rows.new_empty((rows.shape[0], vocabulary)) if buffer is None else buffer[: rows.shape[0]]
        torch.mm(rows, weight.T, out=buffer)
        by_row = [None if each is None else each[chunk] for each in (token_weights, losses, dlosses)]
        with_dlogits = dhidden is not None or dweight is not None
        _cross_entropy(buffer, labels[chunk], *by_row, params, with_dlogits=with_dlogits)
        if dhidden is not None:
            torch.mm(buffer, weight, out=dhidden[chunk])
        if dweight is not None:
            _add_product(dweight, buffer.T, rows, first=chunk.start == 0 and not add)


def _cross_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor,
    token_weights: torch.Tensor | None,
    losses: torch.Tensor | None,
    dlosses: torch.Tensor | None,
    params,
    *,
    with_dlogits: bool,
) -> None:
    """Write the losses of a chunk, and its dlogits over its logits."""
    rows, vocabulary = logits.shape
    tile = configs.softmax_tile(vocabulary)
    n_pieces, lag = launch.cdiv(vocabulary, tile["BLOCK_V"]), configs.lag(rows, vocabulary, logits.element_size())
    smoothing = params.label_smoothing > 0
    said = labels.new_full((rows, n_pieces * (1 + smoothing)), UNSAID.value)
    with launch.on_device(logits):
        launch.run(
            cross_entropy_kernel, ((rows + lag) * n_pieces,),
            logits, labels, token_weights, losses, dlosses, said, rows, vocabulary, n_pieces, lag,
            params.ignore_index, params.label_smoothing, params.z_loss, params.softcap,
            HAS_WEIGHTS=token_weights is not None, HAS_LOSS=losses is not None, HAS_DLOSS=dlosses is not None,
            WITH_DLOGITS=with_dlogits, SMOOTHING=smoothing, SOFTCAP=params.softcap > 0,
            BLOCK_P=launch.next_power_of_2(n_pieces), **tile,
        )  # fmt: skip


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
            launch.run(
                scale_kernel, (launch.cdiv(out.numel(), configs.SCALE_BLOCK),),
                total, factor, out, out.numel(), BLOCK=configs.SCALE_BLOCK, num_warps=8,
            )  # fmt: skip
    return out
