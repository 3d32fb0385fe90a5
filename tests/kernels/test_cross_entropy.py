"""cross_entropy and its gradient beyond the shared grid: the pair against torch's own, shards, errors."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812  (torch's own habit)

from tilestack.kernels import cross_entropy, cross_entropy_gradient

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

OPTIONS = {"label_smoothing": 0.1, "logit_scale": 0.7, "lse_square_scale": 0.05}


def make():
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(6, 30, generator=generator, dtype=torch.float64)
    labels = torch.randint(30, (6,), generator=generator)
    labels[1] = -100
    return logits.requires_grad_(), labels


def plain(logits, labels):
    scaled = 0.7 * logits
    losses = F.cross_entropy(scaled, labels, label_smoothing=0.1, reduction="none")
    return losses + torch.where(labels == -100, 0, 0.05 * scaled.logsumexp(-1).square())


def test_the_references_are_torchs_own():
    logits, labels = make()
    expected, upstream = plain(logits, labels), torch.linspace(-1, 2, 6, dtype=torch.float64)
    losses, z_losses, lse = cross_entropy(logits, labels, **OPTIONS)
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(lse, (0.7 * logits).logsumexp(-1))
    assert z_losses[1] == 0 and not losses.requires_grad
    found = cross_entropy_gradient(upstream, logits, labels, lse, **OPTIONS)
    torch.testing.assert_close(found, torch.autograd.grad(expected, logits, upstream)[0])


@pytest.mark.parametrize("implementation", ["tilestack-triton", "reference"])
def test_shards_of_the_vocabulary_add_up_to_the_whole(implementation):
    logits, labels = make()
    logits, labels = logits.detach().float().to(DEVICE), labels.to(DEVICE)
    whole, z_losses, lse = cross_entropy(logits, labels, **OPTIONS, implementation=implementation)
    shards = [{"class_start": start, "total_classes": 30} for start in (0, 10, 20)]
    parts = [logits[:, each["class_start"] :][:, :10] for each in shards]
    found = [
        cross_entropy(part, labels, **OPTIONS, **shard, is_shard=True, implementation=implementation)
        for part, shard in zip(parts, shards, strict=True)
    ]
    torch.testing.assert_close(torch.stack([each[2] for each in found]).logsumexp(0), lse)
    rest = torch.where(labels == -100, 0, lse + z_losses)
    torch.testing.assert_close(sum(each[0] for each in found) + rest, whole)
    upstream = torch.arange(1.0, 7.0, device=DEVICE)
    expected = cross_entropy_gradient(upstream, logits, labels, lse, **OPTIONS, implementation=implementation)
    gradients = [
        cross_entropy_gradient(upstream, part, labels, lse, **OPTIONS, **shard, implementation=implementation)
        for part, shard in zip(parts, shards, strict=True)
    ]
    torch.testing.assert_close(torch.cat(gradients, 1), expected)


GIVEN = {"logits": torch.ones(3, 5), "labels": torch.zeros(3, dtype=torch.int64)}
BAD = {
    "logits must be floating point, got torch.int64": {"logits": torch.ones(3, 5).long()},
    r"logits must be \[T, V\] .*, got 3 dimensions": {"logits": torch.ones(1, 3, 5)},
    r"V \(the columns of logits\) must be at least 1, got 0": {"logits": torch.ones(3, 0)},
    "labels must be torch.int64, got torch.int32": {"labels": torch.zeros(3).int()},
    r"labels must be \[3\] .*, got \[4\]": {"labels": torch.zeros(4, dtype=torch.int64)},
    "labels must have the device of logits": {"labels": torch.zeros(3, dtype=torch.int64, device="meta")},
    "lse must be torch.float32, got torch.float64": {"lse": torch.zeros(3).double()},
    "label_smoothing must be at least 0 and less than 1, got 1.0": {"label_smoothing": 1.0},
}
BAD_GRADIENT = {
    r"dlosses must be \[3\] .*, got \[4\]": {"dlosses": torch.ones(4)},
    "the last stride of logits must be 1 to write into them, got 3": {"logits": torch.ones(5, 3).T, "inplace": True},
}


@pytest.mark.parametrize("message", BAD)
def test_wrong_input_gets_one_clear_error(message):
    with pytest.raises(ValueError, match=f"^cross_entropy: {message}"):
        cross_entropy(**GIVEN | BAD[message])


@pytest.mark.parametrize("message", BAD | BAD_GRADIENT)
def test_wrong_input_of_the_gradient_gets_one_clear_error(message):
    given = GIVEN | {"lse": torch.ones(3), "dlosses": torch.ones(3)} | (BAD | BAD_GRADIENT)[message]
    with pytest.raises(ValueError, match=f"^cross_entropy_gradient: {message}"):
        cross_entropy_gradient(**given)
