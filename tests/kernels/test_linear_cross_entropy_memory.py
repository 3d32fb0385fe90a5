"""What linear_cross_entropy costs: bytes, products, and reads by the host. Counted, not timed, so no GPU is needed.

A dispatch mode does not see inside a custom op, so the implementations' functions are called as they are. The Triton
kernels allocate nothing and only cost time in the interpreter, so they are left out; the grid is where they run.
"""

import sys

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import tilestack.kernels  # noqa: F401  (registers the op)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FOLDER = "tilestack.kernels.linear_cross_entropy"
configs, op, reference, triton_portable = (
    sys.modules[f"{FOLDER}.{name}"] for name in ("configs", "op", "reference", "triton_portable")
)
TOKENS, VOCABULARY, HIDDEN = 640, 2000, 32
PRODUCTS = ("mm", "addmm")


class Recorder(TorchDispatchMode):
    """Counts operators and follows the storages they make."""

    def __init__(self):
        super().__init__()
        self.calls = []
        self.peak = 0
        self.largest = 0
        self._alive = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.calls.append(func.overloadpacket.__name__)
        for tensor in torch.utils._pytree.tree_leaves(result):
            # a storage that was there before, such as the input of a view or of out=, is not counted
            if isinstance(tensor, torch.Tensor) and not self._is_of_an_argument(tensor, args, kwargs or {}):
                storage = tensor.untyped_storage()
                self._alive[storage.data_ptr()] = (StorageWeakRef(storage), storage.nbytes())
                self.largest = max(self.largest, storage.nbytes())
        self._alive = {key: each for key, each in self._alive.items() if not each[0].expired()}
        self.peak = max(self.peak, sum(nbytes for _, nbytes in self._alive.values()))
        return result

    @staticmethod
    def _is_of_an_argument(tensor, args, kwargs):
        given = [each for each in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
        return any(each.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr() for each in given)

    @property
    def products(self):
        return sum(name in PRODUCTS for name in self.calls)


def run(implementation, *, reduction="mean", gradients=("hidden", "weight"), backward=True):
    """Forward and backward of one call. Returns their recorders; the second is None without a backward."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator).to(DEVICE)
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator).to(DEVICE)
    labels = torch.randint(0, VOCABULARY, (TOKENS,), generator=generator).to(DEVICE)
    num_items = torch.tensor(TOKENS, device=DEVICE) if reduction == "mean" else None
    params = op.LinearCrossEntropyParams(-100, reduction, 0.0, 0.0, 0.0, "hidden" in gradients, "weight" in gradients)
    with Recorder() as forward_recorder:
        loss, _, *auxiliaries = implementation.forward(hidden, weight, labels, num_items, None, None, params)
    if not backward:
        return forward_recorder, None
    named = {"hidden": hidden, "weight": weight, "labels": labels, "num_items": num_items}
    named |= {"token_weights": None, "weight_gradient_sum": None}
    named |= dict(zip(implementation.AUXILIARY, auxiliaries, strict=True))
    saved = [next((named[n] for n in key.split("|") if named[n] is not None and named[n].numel()), None)
             for key in implementation.SAVED]  # fmt: skip
    with Recorder() as backward_recorder:
        implementation.backward(torch.ones_like(loss), None, *saved, needs=gradients, params=params)
    return forward_recorder, backward_recorder


class NoKernel:
    def __getitem__(self, grid):
        return lambda *_, **__: None


@pytest.fixture(autouse=True)
def no_kernels_and_chunks_of_128(monkeypatch):
    for kernel in ("cross_entropy_kernel", "scale_kernel"):
        monkeypatch.setattr(triton_portable, kernel, NoKernel())
    monkeypatch.setattr(configs, "MAX_LOGITS_BYTES", 1)
    monkeypatch.setattr(reference, "MAX_CHUNK_LOGITS", 128 * VOCABULARY)


def test_triton_holds_one_chunk_of_logits_and_the_gradients_sums():
    forward, backward = run(triton_portable)
    chunk, dhidden, dweight = (4 * n for n in (128 * VOCABULARY, TOKENS * HIDDEN, VOCABULARY * HIDDEN))
    small = 64 * TOKENS  # a few numbers a token
    assert chunk <= forward.largest < 4 * TOKENS * VOCABULARY
    assert chunk + dhidden + dweight <= forward.peak <= chunk + dhidden + dweight + small
    assert backward.peak <= dhidden + dweight + small


def test_triton_without_gradients_holds_one_chunk_of_logits():
    forward, _ = run(triton_portable, gradients=(), backward=False)
    assert forward.peak <= 4 * 128 * VOCABULARY + 64 * TOKENS


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("implementation", [triton_portable, reference], ids=["tilestack-triton", "reference"])
def test_the_logits_of_all_tokens_never_exist(implementation, reduction):
    for recorder in run(implementation, reduction=reduction):
        assert recorder.largest <= 4 * 128 * VOCABULARY
        assert recorder.peak < 4 * TOKENS * VOCABULARY


@pytest.mark.parametrize(
    ("reduction", "gradients", "in_forward", "in_backward"),
    [
        ("mean", (), 1, 0),
        ("mean", ("hidden",), 2, 0),
        ("mean", ("weight",), 2, 0),
        ("mean", ("hidden", "weight"), 3, 0),
        ("none", ("hidden", "weight"), 1, 3),
    ],
)
def test_triton_multiplies_only_what_is_wanted(reduction, gradients, in_forward, in_backward):
    forward, backward = run(triton_portable, reduction=reduction, gradients=gradients, backward=bool(gradients))
    n_chunks = TOKENS // 128
    assert forward.products == in_forward * n_chunks
    assert (backward.products if backward else 0) == in_backward * n_chunks


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_triton_never_reads_a_number_from_the_device(reduction, monkeypatch):
    monkeypatch.setattr(triton_portable, "check_labels", lambda *_: None)  # looks at the labels on a CPU alone
    for recorder in run(triton_portable, reduction=reduction):
        assert not {"_local_scalar_dense", "item", "is_nonzero", "nonzero"} & set(recorder.calls)
