"""moe and sort_routes beyond the shared grid: transformers, expert parallelism, frozen weights, errors."""

import importlib

import pytest
import torch
from test_launch import launches_wait

from tilestack.kernels import UnsupportedError, moe, sort_routes
from tilestack.kernels.moe import triton_portable
from tilestack.kernels.moe.configs import _BY_ARCHITECTURE, _FLOAT32, _INTERPRETER, _NARROW
from tilestack.kernels.moe.op import MoEParams

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
IMPLEMENTATIONS = ("reference", "tilestack-triton")

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


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_two_groups_of_experts_add_up_to_one(implementation):
    tensors = {name: tensor.to(DEVICE) for name, tensor in _tensors().items()}
    upstream = torch.randn(T, H).to(DEVICE)
    wanted = ("x", "gate_up", "down", "topk_weights")

    def run(first, last):
        """The answer of experts first to last, whose ids a rank counts from its own first expert."""
        mine = {name: tensors[name].clone() for name in wanted}
        mine["gate_up"], mine["down"] = mine["gate_up"][first:last], mine["down"][first:last]
        mine = {name: tensor.requires_grad_() for name, tensor in mine.items()}
        out = moe(**mine, topk_ids=tensors["topk_ids"] - first, implementation=implementation)
        return out.detach(), *torch.autograd.grad(out, [mine[name] for name in wanted], upstream)

    out, dx, dgate_up, ddown, dweights = run(0, E)
    left, right = run(0, 2), run(2, E)
    torch.testing.assert_close(left[0] + right[0], out)
    torch.testing.assert_close(left[1] + right[1], dx)
    torch.testing.assert_close(torch.cat((left[2], right[2])), dgate_up)
    torch.testing.assert_close(torch.cat((left[3], right[3])), ddown)
    torch.testing.assert_close(left[4] + right[4], dweights)


class _CountedKernel:
    """Stands for a Triton kernel and counts its launches."""

    def __init__(self, kernel):
        self.kernel, self.launches = kernel, 0

    def __getitem__(self, grid):
        self.launches += 1
        return self.kernel[grid]


# what needs a gradient: launches of (row products, weight products, element-wise passes, sums over a token's rows)
LAUNCHES = {
    ("x", "gate_up", "down", "topk_weights"): (2, 2, 1, 1),
    ("x", "topk_weights"): (2, 0, 1, 1),
    ("x",): (2, 0, 1, 1),
    ("gate_up",): (1, 1, 1, 0),
    ("down",): (0, 1, 1, 0),
    ("topk_weights",): (1, 0, 1, 0),
}


@pytest.mark.parametrize("needs", LAUNCHES, ids=" ".join)
def test_a_gradient_that_nobody_needs_costs_no_product_and_changes_no_other(needs, monkeypatch):
    portable, combining = (
        importlib.import_module(f"tilestack.kernels.moe.{name}") for name in ("triton_portable", "combine")
    )
    tensors = {name: tensor.to(DEVICE) for name, tensor in _tensors().items()}
    upstream = torch.randn(T, H).to(DEVICE)

    def forward(names):
        leaves = {name: tensors[name].detach().clone().requires_grad_() for name in names}
        return leaves, moe(**tensors | leaves, implementation="tilestack-triton")

    leaves, out = forward(("x", "gate_up", "down", "topk_weights"))
    expected = dict(zip(leaves, torch.autograd.grad(out, list(leaves.values()), upstream), strict=True))
    launches_wait(monkeypatch)  # which changes no bit either
    leaves, out = forward(needs)
    kernels = (
        (portable, "moe_rows_kernel"),
        (portable, "moe_weights_bwd_kernel"),
        (portable, "moe_swiglu_bwd_kernel"),
        (combining, "moe_combine_kernel"),
    )
    counted = [_CountedKernel(getattr(module, name)) for module, name in kernels]
    for (module, name), kernel in zip(kernels, counted, strict=True):
        monkeypatch.setattr(module, name, kernel)
    found = dict(zip(leaves, torch.autograd.grad(out, list(leaves.values()), upstream), strict=True))
    assert tuple(kernel.launches for kernel in counted) == LAUNCHES[needs]
    for name in needs:
        assert torch.equal(found[name], expected[name]), name


def test_nothing_is_saved_but_inputs_the_pre_activation_and_indices():
    tensors = {name: tensor.to(DEVICE) for name, tensor in _tensors().items()}
    tensors["x"].requires_grad_()
    saved = []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        moe(**tensors, implementation="tilestack-triton")
    inputs = {tensor.data_ptr() for tensor in tensors.values()}
    others = [tensor for tensor in saved if tensor.data_ptr() not in inputs]
    floating = [tensor for tensor in others if tensor.is_floating_point()]
    assert [list(tensor.shape) for tensor in floating] == [[T * K, 2 * I]]
    assert sum(tensor.numel() for tensor in others if not tensor.is_floating_point()) == E + 1 + 2 * T * K


def test_no_more_rows_are_kept_than_the_routes_that_are_said_to_be_here():
    tensors = _tensors()
    tensors["topk_ids"][:, 1:] = E  # other ranks'
    params = MoEParams(keep=True, most_routes=T)
    moved = (each.to(DEVICE) for each in tensors.values())
    _, pre_activation, *_ = triton_portable.forward(*moved, None, None, params)
    assert pre_activation.shape == (T, 2 * I)


def test_with_recompute_no_activation_is_kept_and_gradients_have_the_same_bits():
    tensors = {name: tensor.to(DEVICE) for name, tensor in _tensors().items()}
    leaves = [tensors[name].requires_grad_() for name in ("x", "gate_up", "down", "topk_weights")]
    upstream = torch.randn(T, H).to(DEVICE)
    kept = []

    def pack(tensor):
        if tensor.is_floating_point() and all(tensor.data_ptr() != leaf.data_ptr() for leaf in leaves):
            kept.append(tensor.numel())
        return tensor

    def run(recompute):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = moe(**tensors, recompute=recompute, implementation="tilestack-triton")
        return sum(kept), out, *torch.autograd.grad(out, leaves, upstream)

    (numbers, *plain), (again_numbers, *again) = run(False), run(True)
    assert (numbers, again_numbers) == (T * K * 2 * I, 0)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradients_of_weights_are_added_in_place_and_autograd_gets_none(implementation):
    tensors = {name: tensor.to(DEVICE) for name, tensor in _tensors().items()}
    leaves = [tensors[name].requires_grad_() for name in ("x", "gate_up", "down")]
    upstream = torch.randn(T, H).to(DEVICE)
    dx, *expected = torch.autograd.grad(moe(**tensors, implementation=implementation), leaves, upstream)
    totals = {f"{name}_grad": torch.ones_like(tensors[name]) for name in ("gate_up", "down")}
    for _ in range(2):
        moe(**tensors, **totals, implementation=implementation).backward(upstream)
    assert [leaf.grad is None for leaf in leaves] == [False, True, True]
    torch.testing.assert_close(leaves[0].grad, 2 * dx)
    for total, gradient in zip(totals.values(), expected, strict=True):
        torch.testing.assert_close(total, 1 + 2 * gradient)


def test_a_frozen_weight_and_a_forward_without_gradients_leave_the_sum_alone():
    tensors = _tensors()
    tensors["x"].requires_grad_()
    total = torch.ones_like(tensors["down"])
    moe(**tensors, down_grad=total).sum().backward()
    with torch.no_grad():
        moe(**tensors | {"down": tensors["down"].requires_grad_()}, down_grad=total)
    assert torch.equal(total, torch.ones_like(total))


BAD_SUMS = {
    r"gate_up_grad must be \[6, 32, 32\]": {"gate_up_grad": torch.zeros(E, H, I)},
    "down_grad must be a tensor, got list": {"down_grad": [1]},
    "down_grad must be torch.float32 or the dtype of down, got torch.bfloat16": {
        "down_grad": torch.zeros(E, H, I, dtype=torch.bfloat16)
    },
    "down_grad must be contiguous, got the strides": {"down_grad": torch.zeros(E, I, H).mT},
    "runs only if x or topk_weights requires a gradient": {"down_grad": torch.zeros(E, H, I)},
}


@pytest.mark.parametrize("message", BAD_SUMS)
def test_a_sum_that_cannot_be_written_gets_one_clear_error(message):
    tensors = _tensors()
    tensors["down"].requires_grad_()
    with pytest.raises(ValueError, match=message):
        moe(**tensors, **BAD_SUMS[message])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_nan_of_one_experts_rows_does_not_reach_another_experts_gradient(implementation):
    tensors = {name: tensor.to(DEVICE) for name, tensor in _tensors().items()}
    tensors["topk_ids"] = (torch.arange(T * K).reshape(T, K) // K % E).to(DEVICE)  # each token to one expert
    tensors["x"][0] = float("nan")  # of expert 0
    leaves = [tensors[name].requires_grad_() for name in ("gate_up", "down")]
    gradients = torch.autograd.grad(moe(**tensors, implementation=implementation).sum(), leaves)
    for gradient in gradients:
        assert gradient[0].isnan().any() and gradient[1:].isfinite().all()


def test_up_and_rows_cut_the_rows_into_the_same_blocks():
    for each in (_FLOAT32, _INTERPRETER, _NARROW, *_BY_ARCHITECTURE.values()):
        assert each.up.m == each.rows.m


def test_more_than_sixteen_routes_a_token_are_refused_with_the_reason():
    tensors = _tensors() | {"topk_ids": torch.zeros(T, 17, dtype=torch.int32), "topk_weights": None}
    with pytest.raises(UnsupportedError, match="up to K = 16, got 17"):
        moe(**{name: each if each is None else each.to(DEVICE) for name, each in tensors.items()},
            implementation="tilestack-triton")  # fmt: skip


BAD_MOE = {
    "x must be floating point, got torch.int64": {"x": torch.zeros(T, H, dtype=torch.int64)},
    r"down must have the dtype of x \(torch.float32\), got torch.bfloat16": {
        "down": torch.zeros(E, H, I, dtype=torch.bfloat16)
    },
    r"x must be \[T, H\], got 3 dimensions": {"x": torch.zeros(1, T, H)},
    r"down must be \[E, H, I\], got 2 dimensions": {"down": torch.zeros(H, I)},
    r"down must be \[6, 32, 16\]": {"down": torch.zeros(E, H + 1, I)},
    r"the E of down \[E, H, I\] must be at least 1, got 0": {"down": torch.zeros(0, H, I)},
    r"gate_up must be \[6, 32, 32\]": {"gate_up": torch.zeros(E, I, H)},
    "topk_ids must be int32 or int64, got torch.float32": {"topk_ids": torch.zeros(T, K)},
    r"topk_ids must be \[23, 3\]": {"topk_ids": torch.zeros(T + 1, K, dtype=torch.int32)},
    r"the K of topk_ids \[T, K\] must be at least 1, got 0": {"topk_ids": torch.zeros(T, 0, dtype=torch.int32)},
    "topk_weights must be torch.float32, got torch.bfloat16": {"topk_weights": torch.ones(T, K).bfloat16()},
    r"topk_weights must be \[23, 3\]": {"topk_weights": torch.ones(T, K + 1)},
    r"most_routes must be at least \d+, the ids in \[0, 6\), got 5": {"most_routes": 5},
    "most_routes must be at least 0, got -1": {"most_routes": -1},
}


@pytest.mark.parametrize("message", BAD_MOE)
def test_wrong_input_of_moe_gets_one_clear_error(message):
    with pytest.raises(ValueError, match=message):
        moe(**_tensors() | BAD_MOE[message])


def test_the_scan_of_counts_may_take_several_steps(monkeypatch):
    monkeypatch.setattr(importlib.import_module("tilestack.kernels.sort_routes.triton_portable"), "SCAN_BLOCKS", 4)
    ids = torch.randint(-1, 8, (700, 3), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    found, expected = (sort_routes(ids, 7, implementation=name) for name in ("tilestack-triton", "reference"))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


BAD_IDS = {
    "topk_ids must be int32 or int64, got torch.int16": (torch.zeros(4, 2, dtype=torch.int16), 8),
    r"topk_ids must be \[T, K\], got 1 dimensions": (torch.zeros(4, dtype=torch.int32), 8),
    r"topk_ids must have fewer than 2\^31 - 2\^16 routes": (torch.zeros(1, 1, dtype=torch.int32).expand(2**30, 2), 8),
    "num_experts must be at least 1, got 0": (torch.zeros(4, 2, dtype=torch.int32), 0),
}


@pytest.mark.parametrize("message", BAD_IDS)
def test_wrong_input_of_sort_routes_gets_one_clear_error(message):
    with pytest.raises(ValueError, match=message):
        sort_routes(*BAD_IDS[message])
