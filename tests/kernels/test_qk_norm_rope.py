"""qk_norm_rope: the reference is transformers', outputs without a gradient, refusals."""

import pytest
import torch

from tilestack.kernels import qk_norm_rope
from tilestack.kernels.device import Device
from tilestack.kernels.qk_norm_rope.op import OP

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
B, S, HQ, HK, D = 2, 6, 4, 2, 16


def _inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)

    def random(*size):
        return torch.randn(size, generator=generator).to(DEVICE, dtype)

    q, k = random(B, S, HQ, D), random(B, S, HK, D)
    return q, k, random(D), random(D), random(1, S, D), random(1, S, D)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_reference_has_the_bits_and_the_gradients_of_transformers(dtype):
    modeling = pytest.importorskip("transformers.models.qwen3_moe.modeling_qwen3_moe")
    inputs = _inputs(dtype)
    theirs, ours = ([each.clone().requires_grad_(i < 4) for i, each in enumerate(inputs)] for _ in range(2))

    def in_transformers(q, k, q_weight, k_weight, cos, sin):
        norms = [modeling.Qwen3MoeRMSNorm(D, eps=1e-6).to(DEVICE, dtype) for _ in range(2)]
        q, k = (
            torch.func.functional_call(norm, {"weight": weight}, (x,)).transpose(1, 2)
            for norm, weight, x in zip(norms, (q_weight, k_weight), (q, k), strict=True)
        )
        q, k = modeling.apply_rotary_pos_emb(q, k, cos, sin)
        return q.transpose(1, 2), k.transpose(1, 2)

    expected, found = in_transformers(*theirs), qk_norm_rope(*ours, implementation="reference")
    for out, want in zip(found, expected, strict=True):
        assert torch.equal(out, want)
    upstream = [torch.randn_like(out) for out in found]
    wanted = torch.autograd.grad(expected, theirs[:4], upstream)
    for gradient, want in zip(torch.autograd.grad(found, ours[:4], upstream), wanted, strict=True):
        torch.testing.assert_close(gradient, want)  # the sum over tokens runs in another order


@pytest.mark.parametrize("used", [0, 1])
@pytest.mark.parametrize("implementation", [each.name for each in OP.implementations])
def test_an_output_that_nothing_flows_back_from_gives_zero_gradients(implementation, used):
    reason = next(each for each in OP.implementations if each.name == implementation).refuses_machine(Device.of(DEVICE))
    if reason:
        pytest.skip(reason)
    q, k, q_weight, k_weight, cos, sin = _inputs()
    leaves = [each.requires_grad_() for each in (q, k, q_weight, k_weight)]
    outputs = qk_norm_rope(*leaves, cos, sin, implementation=implementation)
    outputs[used].sum().backward()
    for index in (used, used + 2):
        assert leaves[index].grad.abs().max() > 0
    for index in (1 - used, 3 - used):
        assert torch.equal(leaves[index].grad, torch.zeros_like(leaves[index]))


def test_no_gradient_flows_to_the_tables():
    q, k, q_weight, k_weight, cos, sin = _inputs()
    cos.requires_grad_()
    q_out, _ = qk_norm_rope(q, k, q_weight, k_weight, cos, sin)
    assert not q_out.requires_grad


@pytest.mark.parametrize(
    ("index", "wrong", "message"),
    [
        (0, torch.ones(S, HQ, D), r"q must be \[B, S, Hq, D\], got 3 dimensions"),
        (0, torch.ones(B, S, HQ, 15), "D, the last dimension of q, must be even and positive, got 15"),
        (0, torch.ones(B, S, 0, D), "Hq, the heads of q, must be at least 1, got 0"),
        (0, torch.ones(B, S, HQ, D, dtype=torch.int64), "q must be floating point"),
        (1, torch.ones(B, S + 1, HK, D), r"k must be \[2, 6, 2, 16\].*got \[2, 7, 2, 16\]"),
        (1, torch.ones(B, S, HK, D).bfloat16(), r"k must have the dtype of q \(torch.float32\), got torch.bfloat16"),
        (2, torch.ones(D + 1), r"q_weight must be \[16\] \(\[D\]\), got \[17\]"),
        (3, torch.ones(HK, D), r"k_weight must be \[16\] \(\[D\]\), got \[2, 16\]"),
        (4, torch.ones(3, S, D), r"cos must be \[B or 1, S, D\] = \[2 or 1, 6, 16\], got \[3, 6, 16\]"),
        (4, torch.ones(1, S, D).half(), r"cos must be torch.float32 or q's dtype \(torch.float32\), got torch.float16"),
        (5, torch.ones(2, S, D), r"sin must be \[1, 6, 16\] \(the shape of cos\), got \[2, 6, 16\]"),
        (5, torch.ones(1, S, D, device="meta"), "sin must have the device of q"),
    ],
)
def test_wrong_input_gets_one_clear_error(index, wrong, message):
    inputs = [each.cpu() for each in _inputs()]
    inputs[index] = wrong
    with pytest.raises(ValueError, match=f"qk_norm_rope: {message}"):
        qk_norm_rope(*inputs)
