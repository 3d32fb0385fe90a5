"""moe and sort_routes beyond the shared grid: agreement with transformers, errors."""

import pytest
import torch

from tilestack.kernels import moe, sort_routes

T, H, I, E, K = 23, 32, 16, 6, 3


def _tensors(seed=0):
    generator = torch.Generator().manual_seed(seed)

    def random(*size, scale=1.0):
        return scale * torch.randn(*size, generator=generator)

    return {
        "x": random(T, H),
        "gate_up": random(E, 2 * I, H, scale=H**-0.5),
        "down": random(E, H, I, scale=I**-0.5),
        "topk_ids": torch.randint(0, E, (T, K), generator=generator),
        "topk_weights": torch.rand(T, K, generator=generator),
    }


def test_output_and_gradients_are_those_of_transformers_experts():
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    config = Qwen3MoeConfig(hidden_size=H, moe_intermediate_size=I, num_experts=E, num_experts_per_tok=K)
    config._experts_implementation = "eager"
    tensors = _tensors()
    tensors["topk_ids"] = torch.stack([torch.randperm(E)[:K] for _ in range(T)])
    experts = Qwen3MoeExperts(config)
    experts.load_state_dict({"gate_up_proj": tensors["gate_up"], "down_proj": tensors["down"]})
    leaves = {name: tensors[name].requires_grad_() for name in ("x", "gate_up", "down", "topk_weights")}
    out = moe(**tensors)
    expected = experts(tensors["x"], tensors["topk_ids"], tensors["topk_weights"])
    torch.testing.assert_close(out, expected)
    upstream = torch.randn(T, H)
    parameters = [leaves["x"], experts.gate_up_proj, experts.down_proj, leaves["topk_weights"]]
    found = torch.autograd.grad(out, list(leaves.values()), upstream)
    for mine, theirs in zip(found, torch.autograd.grad(expected, parameters, upstream), strict=True):
        torch.testing.assert_close(mine, theirs)


BAD_MOE = {
    "x must be floating point, got torch.int64": {"x": torch.zeros(T, H, dtype=torch.int64)},
    r"down must have the dtype of x \(torch.float32\), got torch.bfloat16": {
        "down": torch.zeros(E, H, I, dtype=torch.bfloat16)
    },
    r"x must be \[T, H\], got 3 dimensions": {"x": torch.zeros(1, T, H)},
    r"down must be \[E, H, I\], got 2 dimensions": {"down": torch.zeros(H, I)},
    r"down must be \[6, 32, 16\]": {"down": torch.zeros(E, H + 1, I)},
    r"gate_up must be \[6, 32, 32\]": {"gate_up": torch.zeros(E, I, H)},
    "topk_ids must be int32 or int64, got torch.float32": {"topk_ids": torch.zeros(T, K)},
    r"topk_ids must be \[23, 3\]": {"topk_ids": torch.zeros(T + 1, K, dtype=torch.int32)},
    r"the K of topk_ids \[T, K\] must be at least 1, got 0": {"topk_ids": torch.zeros(T, 0, dtype=torch.int32)},
    "topk_weights must be torch.float32, got torch.bfloat16": {"topk_weights": torch.ones(T, K).bfloat16()},
    r"topk_weights must be \[23, 3\]": {"topk_weights": torch.ones(T, K + 1)},
}


@pytest.mark.parametrize("message", BAD_MOE)
def test_wrong_input_of_moe_gets_one_clear_error(message):
    with pytest.raises(ValueError, match=message):
        moe(**_tensors() | BAD_MOE[message])


BAD_IDS = {
    "topk_ids must be int32 or int64, got torch.int16": (torch.zeros(4, 2, dtype=torch.int16), 8),
    r"topk_ids must be \[T, K\], got 1 dimensions": (torch.zeros(4, dtype=torch.int32), 8),
    "num_experts must be at least 1, got 0": (torch.zeros(4, 2, dtype=torch.int32), 0),
}


@pytest.mark.parametrize("message", BAD_IDS)
def test_wrong_input_of_sort_routes_gets_one_clear_error(message):
    with pytest.raises(ValueError, match=message):
        sort_routes(*BAD_IDS[message])
