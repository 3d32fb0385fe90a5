"""router and load_balancing_loss beyond the shared grid: agreement with transformers, errors."""

import pytest
import torch

from tilestack.kernels import UnsupportedError, load_balancing_loss, router

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _logits(tokens=50, experts=12, seed=0):
    return 2 * torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("normalize", [True, False])
def test_weights_and_ids_are_those_of_transformers_router(normalize):
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

    config = Qwen3MoeConfig(hidden_size=32, num_experts=12, num_experts_per_tok=3, norm_topk_prob=normalize)
    theirs = Qwen3MoeTopKRouter(config)
    torch.nn.init.normal_(theirs.weight)
    logits, weights, ids = theirs(torch.randn(40, 32))
    ours = router(logits, top_k=3, normalize=normalize)
    assert torch.equal(ours.topk_ids.long(), ids)
    torch.testing.assert_close(ours.topk_weights, weights)


@pytest.mark.parametrize("masked", [False, True])
def test_load_balancing_loss_and_its_gradient_are_those_of_transformers(masked):
    from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

    layers = [_logits(seed=seed).requires_grad_() for seed in range(3)]
    mask = torch.rand(5, 10, generator=torch.Generator().manual_seed(9)) < 0.7 if masked else None
    theirs = load_balancing_loss_func(tuple(layers), 12, 4, mask)
    outputs = [router(each, top_k=4, token_mask=None if mask is None else mask.reshape(-1)) for each in layers]
    num_tokens = 3 * (50 if mask is None else mask.sum())
    ours = load_balancing_loss(
        sum(each.tokens_per_expert for each in outputs), sum(each.probability_sum for each in outputs), num_tokens
    )
    torch.testing.assert_close(ours, theirs)
    for mine, expected in zip(torch.autograd.grad(ours, layers), torch.autograd.grad(theirs, layers), strict=True):
        torch.testing.assert_close(mine, expected)


@pytest.mark.parametrize("implementation", ["reference", "tilestack-triton"])
def test_equal_infinite_and_nan_logits_choose_different_experts_in_a_fixed_order(implementation):
    inf, nan = float("inf"), float("nan")
    logits = torch.tensor(
        [[0.0, -0.0, 0.0, 1.0], [-inf, -inf, -inf, -inf], [-inf, 2.0, -inf, -3.0], [1.0, nan, 2.0, nan]]
    )
    ids = router(logits.to(DEVICE), top_k=3, implementation=implementation).topk_ids
    assert ids.tolist() == [[3, 0, 1], [0, 1, 2], [1, 3, 0], [1, 3, 2]]


@pytest.mark.parametrize(
    ("experts", "top_k", "reason"), [(32, 17, "up to K = 16, got 17"), (1025, 2, "up to E = 1024")]
)
def test_what_does_not_fit_into_registers_is_refused_with_the_reason(experts, top_k, reason):
    with pytest.raises(UnsupportedError, match=reason):
        router(torch.zeros(4, experts, device=DEVICE), top_k=top_k, implementation="tilestack-triton")


BAD = {
    "logits must be floating point, got torch.int64": {"logits": torch.zeros(4, 8, dtype=torch.int64)},
    r"logits must be \[T, E\], got 3 dimensions": {"logits": torch.zeros(1, 4, 8)},
    r"top_k must be from 1 to the number of experts \(8\), got 9": {"top_k": 9},
    r"top_k must be from 1 to the number of experts \(8\), got 0": {"top_k": 0},
    "token_mask must be torch.bool, got torch.float32": {"token_mask": torch.ones(4)},
    r"token_mask must be \[4\]": {"token_mask": torch.ones(5, dtype=torch.bool)},
}


@pytest.mark.parametrize("message", BAD)
def test_wrong_input_gets_one_clear_error(message):
    arguments = {"logits": torch.zeros(4, 8), "top_k": 2} | BAD[message]
    with pytest.raises(ValueError, match=message):
        router(**arguments)


def test_statistics_of_different_numbers_of_experts_are_refused():
    with pytest.raises(ValueError, match=r"probability_sum must be \[8\]"):
        load_balancing_loss(torch.ones(8), torch.ones(7), 4)
