"""linear_cross_entropy beyond the grid: chunks, options, errors, autograd and torch.compile."""

import sys

import pytest
import torch

from tilestack.kernels import linear_cross_entropy
from tilestack.testing.cases.linear_cross_entropy import CASES
from tilestack.testing.compare import Case, assert_close, check

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
IMPLEMENTATIONS = ("reference", "tilestack-triton")
FOLDER = "tilestack.kernels.linear_cross_entropy"
configs, reference, triton_portable = (
    sys.modules[f"{FOLDER}.{name}"] for name in ("configs", "reference", "triton_portable")
)


def example(tokens=7, vocabulary=50, hidden_size=16, dtype=torch.float32, grad=True):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, hidden_size, generator=generator).to(DEVICE, dtype).requires_grad_(grad)
    weight = torch.randn(vocabulary, hidden_size, generator=generator).to(DEVICE, dtype).requires_grad_(grad)
    labels = torch.randint(0, vocabulary, (tokens,), generator=generator).to(DEVICE)
    labels[1::3] = -100
    return hidden, weight, labels


@pytest.fixture
def small_chunks(monkeypatch):
    """The smallest chunks there are: 128 tokens of the Triton path, one of the reference."""
    monkeypatch.setattr(configs, "MAX_LOGITS_BYTES", 1)
    monkeypatch.setattr(reference, "MAX_CHUNK_LOGITS", 1)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", CASES.dtypes, ids=str)
def test_many_chunks_are_within_twice_the_error_of_eager(dtype, reduction, monkeypatch):
    monkeypatch.setattr(configs, "MAX_LOGITS_BYTES", 1)

    def make(dtype, device, generator):
        labels = torch.randint(0, 200, (150,), generator=generator).to(device)
        hidden = torch.randn(150, 16, generator=generator).to(device, dtype)
        weight = torch.randn(200, 16, generator=generator).to(device, dtype)
        return {"hidden": hidden, "weight": weight, "labels": labels}

    case = Case("chunks", "the sums go over several chunks", make, {"reduction": reduction})
    check(CASES, case, "tilestack-triton", dtype, DEVICE)


@pytest.mark.parametrize("lag", [1, 5])
def test_the_pieces_of_a_row_agree_however_far_the_second_reading_is_behind(lag, monkeypatch):
    """Logits of both signs, rows whose largest logit is negative, and labels in every piece."""
    monkeypatch.setattr(configs, "softmax_tile", lambda vocabulary: {"BLOCK_V": 64, "num_warps": 1})
    monkeypatch.setattr(configs, "lag", lambda rows, vocabulary, itemsize: min(rows, lag))

    def make(dtype, device, generator):
        hidden = torch.randn(8, 16, generator=generator).abs().to(device, dtype)
        weight = torch.randn(300, 16, generator=generator)
        weight[:, 0] -= 40.0 * (torch.arange(300) % 2)
        hidden[::2, 0] += 8
        labels = torch.arange(8).mul(40).to(device)
        labels[3] = -100
        return {"hidden": hidden, "weight": weight.to(device, dtype), "labels": labels}

    options = {"label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 30.0}
    for given in ({}, options):
        check(CASES, Case("pieces", "five a row", make, given), "tilestack-triton", torch.float32, DEVICE)


def test_the_references_chunks_do_not_change_its_result(small_chunks):
    hidden, weight, labels = example(dtype=torch.float64)
    for reduction in ("mean", "sum", "none"):
        loss = linear_cross_entropy(hidden, weight, labels, reduction=reduction, implementation="reference")
        plain = torch.nn.functional.cross_entropy(hidden @ weight.T, labels, reduction=reduction)
        torch.testing.assert_close(loss, plain)
        upstream = torch.linspace(1, 2, plain.numel(), dtype=torch.float64, device=DEVICE).reshape(plain.shape)
        found, expected = (torch.autograd.grad(each, (hidden, weight), upstream) for each in (loss, plain))
        torch.testing.assert_close(found, expected)


def test_chunks_cover_every_token_once_and_fit_the_limit():
    for tokens, vocabulary, itemsize in ((16384, 151936, 2), (2049, 151936, 2), (4096, 151936, 4), (300, 7, 2)):
        chunks = list(configs.chunks(tokens, vocabulary, itemsize))
        assert [token for chunk in chunks for token in range(chunk.start, chunk.stop)] == list(range(tokens))
        sizes = [chunk.stop - chunk.start for chunk in chunks]
        assert max(sizes) == sizes[0] and sizes[0] * vocabulary * itemsize <= configs.MAX_LOGITS_BYTES
    assert [chunk.stop for chunk in configs.chunks(16384, 151936, 2)] == list(range(2048, 16385, 2048))
    assert list(configs.chunks(0, 151936, 2)) == []


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_mean_over_nothing_is_zero_where_torch_gives_nan(implementation):
    hidden, weight, labels = example()
    labels.fill_(-100)
    assert torch.nn.functional.cross_entropy(hidden @ weight.T, labels).isnan()
    for num_items in (None, 0, torch.zeros((), dtype=torch.int64, device=DEVICE)):
        loss = linear_cross_entropy(hidden, weight, labels, num_items=num_items, implementation=implementation)
        assert loss.item() == 0
        assert not any(gradient.any() for gradient in torch.autograd.grad(loss, (hidden, weight)))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", ["number", "integer tensor", "tensor of shape [1]"])
def test_num_items_makes_micro_batches_add_up_to_the_global_mean(implementation, kind):
    hidden, weight, labels = example(tokens=12)
    items = int((labels != -100).sum())
    num_items = {
        "number": items,
        "integer tensor": torch.tensor(items, device=DEVICE),
        "tensor of shape [1]": torch.tensor([float(items)], device=DEVICE),
    }[kind]
    parts = [
        linear_cross_entropy(hidden[cut], weight, labels[cut], num_items=num_items, implementation=implementation)
        for cut in (slice(0, 5), slice(5, 12))
    ]
    whole = linear_cross_entropy(hidden, weight, labels, implementation=implementation)
    torch.testing.assert_close(sum(parts), whole)
    found, expected = (torch.autograd.grad(each, (hidden, weight)) for each in (sum(parts), whole))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("label", [-1, 50, 2**32 + 3])
def test_a_label_out_of_range_raises_on_a_cpu(label):
    hidden, weight, labels = (each.detach().cpu() for each in example())
    labels[2] = label
    with pytest.raises(IndexError, match=rf"labels must be in \[0, 50\).*got {label}"):
        linear_cross_entropy(hidden, weight, labels)


@pytest.mark.parametrize("label", [-1, 50, 2**32 + 3])
def test_a_label_out_of_range_makes_loss_and_gradients_nan_where_nobody_can_look(label, monkeypatch):
    monkeypatch.setattr(triton_portable, "check_labels", lambda *_: None)
    hidden, weight, labels = example()
    labels[2] = label
    losses = linear_cross_entropy(hidden, weight, labels, reduction="none", implementation="tilestack-triton")
    assert losses.isnan().tolist() == [False, False, True, False, False, False, False]
    loss = linear_cross_entropy(hidden, weight, labels, implementation="tilestack-triton")
    dhidden, dweight = torch.autograd.grad(loss, (hidden, weight))
    assert loss.isnan() and dhidden[2].isnan().all() and dweight.isnan().all()


def wrong(**changes):
    hidden, weight, labels = example()
    return {"hidden": hidden, "weight": weight, "labels": labels} | changes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (wrong(hidden=torch.zeros(2, 3, 16)), r"hidden must be \[T, H\].*\[2, 3, 16\]"),
        (wrong(hidden=torch.zeros(7, 16, dtype=torch.int32)), "hidden must be floating point, got torch.int32"),
        (wrong(hidden=torch.zeros(7, 16).half()), r"weight must have the dtype of hidden \(torch.float16\)"),
        (wrong(weight=torch.zeros(50, 8)), r"weight must be \[50, 16\].*got \[50, 8\]"),
        (wrong(weight=torch.zeros(0, 16)), r"V \(the rows of weight\) must be at least 1, got 0"),
        (wrong(labels=torch.zeros(7, dtype=torch.int32)), "labels must be torch.int64, got torch.int32; convert"),
        (wrong(labels=torch.zeros(6, dtype=torch.int64)), r"labels must be \[7\].*got \[6\]"),
        (wrong(labels=torch.zeros(7, dtype=torch.int64, device="meta")), "labels must have the device of hidden"),
        (wrong(reduction="average"), "reduction must be one of 'mean', 'sum', 'none', got 'average'"),
        (wrong(reduction="sum", num_items=3), "num_items is the divisor of reduction='mean', got 'sum'"),
        (wrong(num_items=torch.ones(2)), r"num_items must be a number or one element, got \[2\]"),
        (wrong(num_items=-1), "num_items must be at least 0, got -1"),
        (wrong(token_weights=torch.ones(6)), r"token_weights must be \[7\].*got \[6\]"),
        (wrong(token_weights=torch.ones(7).half()), "token_weights must be torch.float32, got torch.float16"),
        (wrong(weight_gradient_sum=torch.zeros(50, 8)), r"weight_gradient_sum must be \[50, 16\].*got \[50, 8\]"),
        (wrong(weight_gradient_sum=torch.zeros(50, 16).half()), "weight_gradient_sum must be torch.float32"),
        (
            wrong(hidden=example(grad=False)[0], weight_gradient_sum=torch.zeros(50, 16, device=DEVICE)),
            "weight_gradient_sum is written in backward, which needs hidden to require a gradient",
        ),
        (wrong(label_smoothing=1.5), r"label_smoothing must be in \[0, 1\], got 1.5"),
        (wrong(z_loss=-1e-4), "z_loss must be at least 0, got -0.0001"),
        (wrong(softcap=0.0), "softcap must be a number above 0, or None for none, got 0.0"),
        (wrong(reduction="none", return_token_losses=True), "return_token_losses goes with a scalar loss"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_arguments_get_one_clear_error(arguments, message):
    with pytest.raises(ValueError, match=f"linear_cross_entropy: {message}"):
        linear_cross_entropy(**arguments)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_second_backward_gives_the_same_gradients(implementation, reduction):
    hidden, weight, labels = example()
    loss = linear_cross_entropy(hidden, weight, labels, reduction=reduction, implementation=implementation)
    upstream = torch.full_like(loss, 3.0)
    first = torch.autograd.grad(loss, (hidden, weight), upstream, retain_graph=True)
    second = torch.autograd.grad(loss, (hidden, weight), upstream)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_freezing_one_input_does_not_change_the_gradient_of_the_other(frozen, reduction):
    def gradient(freeze):
        tensors = dict(zip(("hidden", "weight", "labels"), example(), strict=True))
        if freeze:
            tensors[frozen].requires_grad_(False)
        loss = linear_cross_entropy(**tensors, reduction=reduction, implementation="tilestack-triton")
        loss.sum().backward()
        return tensors["weight" if frozen == "hidden" else "hidden"].grad

    assert torch.equal(gradient(True), gradient(False))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_micro_batches_add_the_gradient_of_weight_in_place(implementation, reduction, small_chunks):
    """Both forwards come first, as in a pipeline."""
    hidden, weight, labels = example(tokens=300)
    halves = (slice(0, 140), slice(140, 300))
    options = {"reduction": reduction, "implementation": implementation}
    start = torch.randn(weight.shape, device=DEVICE)
    total, expected = start.clone(), start.clone()
    losses = [
        linear_cross_entropy(hidden[half], weight, labels[half], weight_gradient_sum=total, **options)
        for half in halves
    ]
    for loss in losses:
        (2 * loss.sum()).backward()
    found, hidden.grad = hidden.grad, None
    assert weight.grad is None
    for half in halves:
        (2 * linear_cross_entropy(hidden[half], weight, labels[half], **options).sum()).backward()
        expected += weight.grad
        weight.grad = None
    assert torch.equal(found, hidden.grad)
    torch.testing.assert_close(total, expected)
    assert not torch.equal(total, start)


def test_tied_weights_get_the_gradient_of_both_uses():
    def run(dtype, device, implementation):
        _, weight, labels = example(tokens=20)
        weight = weight.detach().to(device, dtype).requires_grad_()
        hidden = torch.tanh(torch.nn.functional.embedding(torch.arange(20, device=device), weight))
        loss = linear_cross_entropy(hidden, weight, labels.to(device), implementation=implementation)
        return torch.autograd.grad(loss, weight)[0]

    exact = run(torch.float64, "cpu", "reference")
    for dtype in (torch.float32, torch.bfloat16):
        ours, eager = (run(dtype, DEVICE, each) for each in ("tilestack-triton", "reference"))
        assert_close("dweight", ours, eager, exact)


def test_small_float16_gradients_survive_until_the_loss_scale_lifts_them():
    def run(dtype, device, implementation):
        hidden, weight, labels = (each.detach().to(device) for each in example(dtype=torch.float16))
        leaves = [each.to(dtype).requires_grad_() for each in (hidden, weight)]
        loss = linear_cross_entropy(*leaves, labels, num_items=10_000_000, implementation=implementation)
        return torch.autograd.grad(loss * 2.0**20, leaves)

    exact = run(torch.float64, "cpu", "reference")
    ours, eager = (run(torch.float16, DEVICE, each) for each in ("tilestack-triton", "reference"))
    for name, *tensors in zip(("dhidden", "dweight"), ours, eager, exact, strict=True):
        assert_close(name, *tensors)


def test_equal_inputs_give_equal_bits(monkeypatch):
    monkeypatch.setattr(configs, "MAX_LOGITS_BYTES", 1)
    hidden, weight, labels = example(tokens=200, vocabulary=999)

    def run():
        loss = linear_cross_entropy(hidden, weight, labels, implementation="tilestack-triton")
        return loss, *torch.autograd.grad(loss, (hidden, weight))

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("grad", [True, False], ids=["training", "inference"])
def test_opcheck_passes(implementation, reduction, grad):
    hidden, weight, labels = example(grad=grad)
    num_items = torch.tensor(4, device=DEVICE) if reduction == "mean" else None
    forward = getattr(torch.ops.tilestack, f"linear_cross_entropy_forward_{implementation.split('-')[-1]}").default
    torch.library.opcheck(
        forward, (hidden, weight, labels, num_items, None, None, -100, reduction, 0.1, 1e-3, 20.0, grad, grad)
    )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("num_items", [None, 9], ids=["own mean", "num_items"])
def test_torch_compile_takes_it_in_one_graph(implementation, num_items):
    hidden, weight, labels = example()

    def step(hidden, weight, labels):
        return linear_cross_entropy(
            torch.tanh(hidden), weight, labels, num_items=num_items, implementation=implementation
        )

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    losses = step(hidden, weight, labels), compiled(hidden, weight, labels)
    torch.testing.assert_close(*losses, rtol=0, atol=0)
    torch.testing.assert_close(*(torch.autograd.grad(loss, (hidden, weight)) for loss in losses), rtol=0, atol=0)
