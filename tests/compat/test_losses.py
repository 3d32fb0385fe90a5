"""The losses of flash-attn against torch's own cross entropy; the vocabulary in shards against the whole."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F  # noqa: N812  (torch's own habit)
from naive_attention import DEVICE, random

from tilestack.compat.flash_attn.losses.cross_entropy import CrossEntropyLoss
from tilestack.compat.flash_attn.ops.triton.cross_entropy import cross_entropy_loss
from tilestack.testing.compare import assert_close

ROWS, CLASSES = 9, 517


def make(dtype=torch.float32):
    labels = torch.randint(CLASSES, (ROWS,), generator=torch.Generator().manual_seed(1))
    labels[2] = labels[5] = -100
    return random(ROWS, CLASSES, dtype=dtype, seed=2, scale=3.0), labels.to(DEVICE)


def plain(logits, labels, smoothing=0.0, scale=1.0, z=0.0, reduction="none"):
    """Torch's own, with the z-loss written out."""
    scaled = scale * logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = F.cross_entropy(scaled, labels, label_smoothing=smoothing, reduction="none")
    z_losses = torch.where(labels == -100, 0, z * scaled.logsumexp(-1).square())
    losses = losses + z_losses
    if reduction == "none":
        return losses, z_losses
    divisor = (labels != -100).sum() if reduction == "mean" else 1
    return losses.sum() / divisor, z_losses.sum() / divisor


def test_labels_are_integers_of_either_width():
    logits, labels = make()
    assert torch.equal(CrossEntropyLoss()(logits, labels.int()), CrossEntropyLoss()(logits, labels))


OPTIONS = {"plain": (0.0, 1.0, 0.0), "smoothed": (0.2, 1.0, 0.0), "scaled": (0.0, 0.6, 0.0), "all": (0.1, 0.6, 0.05)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", OPTIONS)
def test_the_loss_and_its_gradient_are_torchs(name, reduction, dtype):
    smoothing, scale, z = OPTIONS[name]
    logits, labels = make(dtype)
    layer = CrossEntropyLoss(
        reduction=reduction, label_smoothing=smoothing, logit_scale=scale, lse_square_scale=z, return_z_loss=True
    )
    results = []
    for function, given, where in (
        (layer, logits, labels),
        (lambda *inputs: plain(*inputs, smoothing, scale, z, reduction), logits, labels),
        (lambda *inputs: plain(*inputs, smoothing, scale, z, reduction), logits.detach().cpu().double(), labels.cpu()),
    ):
        leaf = given.detach().requires_grad_()
        loss, z_loss = function(leaf, where)
        upstream = torch.linspace(-1, 2, loss.numel(), device=loss.device, dtype=loss.dtype).view(loss.shape)
        results.append((loss.detach(), z_loss.detach(), torch.autograd.grad(loss, leaf, upstream + 2)[0]))
    assert results[0][0].dtype == torch.float32
    for index, each in enumerate(("loss", "z_loss")):
        assert_close(each, *(result[index] for result in results))
    ours, eager, exact = (result[2].cpu().double() for result in results)
    error, eager_error = ((each - exact).abs().max() for each in (ours, eager))
    # lse is kept as one float32 number, whose unit goes into every probability; torch keeps the largest logit apart
    units = torch.finfo(dtype).eps + torch.finfo(torch.float32).eps * (scale * logits).float().logsumexp(-1).abs().max()
    assert error <= 2 * eager_error + units.cpu() * exact.abs().max()


def test_one_result_is_returned_unless_two_are_asked_for():
    logits, labels = make()
    loss = CrossEntropyLoss()(logits, labels)
    torch.testing.assert_close(loss, F.cross_entropy(logits, labels))
    losses, z_losses = cross_entropy_loss(logits, labels, lse_square_scale=0.1)
    assert losses.requires_grad and not z_losses.requires_grad
    with pytest.raises(ValueError, match="reduction must be 'mean', 'sum' or 'none', got 'max'"):
        CrossEntropyLoss(reduction="max")


def test_a_known_lse_is_used_where_nothing_is_scaled_or_smoothed():
    logits, labels = make()
    lse = logits.detach().logsumexp(-1)
    for options in ({}, {"logit_scale": 0.5}, {"label_smoothing": 0.1}):
        expected, _ = cross_entropy_loss(logits, labels, **options)
        found, _ = cross_entropy_loss(logits, labels, lse, **options)
        torch.testing.assert_close(found, expected)
    shifted, _ = cross_entropy_loss(logits, labels, lse + 1)
    torch.testing.assert_close(shifted, cross_entropy_loss(logits, labels)[0] + (labels != -100))


def test_the_gradient_may_be_written_over_the_logits():
    leaf, labels = make()
    (expected,) = torch.autograd.grad(cross_entropy_loss(leaf, labels)[0].sum(), leaf)
    logits = leaf * 1
    loss = cross_entropy_loss(logits, labels, inplace_backward=True)[0].sum()
    (found,) = torch.autograd.grad(loss, logits)
    assert torch.equal(found, expected) and found.data_ptr() == logits.data_ptr()


def test_it_compiles_into_one_graph():
    logits, labels = make()
    compiled = torch.compile(cross_entropy_loss, fullgraph=True, backend="aot_eager")
    found, expected = (each(logits, labels, lse_square_scale=0.1)[0] for each in (compiled, cross_entropy_loss))
    assert torch.equal(found, expected)
    assert torch.equal(*(torch.autograd.grad(each.sum(), logits)[0] for each in (found, expected)))


SHARDED = """
import sys
import torch
import torch.distributed as dist
from tilestack.compat.flash_attn.ops.triton.cross_entropy import cross_entropy_loss
rank, path = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
generator = torch.Generator().manual_seed(0)
whole = 3 * torch.randn(6, 40, generator=generator)
labels = torch.randint(40, (6,), generator=generator)
labels[1] = -100
for options in ({}, {"label_smoothing": 0.1, "logit_scale": 0.7, "lse_square_scale": 0.05}):
    whole = whole.detach().requires_grad_()
    expected = cross_entropy_loss(whole, labels, **options)
    shard = whole.detach()[:, 20 * rank : 20 * rank + 20].clone().requires_grad_()
    found = cross_entropy_loss(shard, labels, **options, process_group=dist.group.WORLD)
    for pair in zip(found, expected, strict=True):
        torch.testing.assert_close(*pair)
    upstream = torch.arange(1.0, 7.0)
    (gradient,) = torch.autograd.grad(expected[0], whole, upstream)
    (own,) = torch.autograd.grad(found[0], shard, upstream)
    torch.testing.assert_close(own, gradient[:, 20 * rank : 20 * rank + 20])
dist.destroy_process_group()
"""


def test_two_processes_with_half_of_the_vocabulary_each_have_the_loss_of_the_whole(tmp_path):
    environment = {name: each for name, each in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    workers = [
        subprocess.Popen([sys.executable, "-c", SHARDED, str(rank), str(tmp_path / "meet")], env=environment,
                         stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]  # fmt: skip
    for worker in workers:
        _, errors = worker.communicate(timeout=120)
        assert worker.returncode == 0, errors
