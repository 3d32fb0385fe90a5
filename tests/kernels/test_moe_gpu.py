"""moe on a GPU: random routings, equal bits, offsets beyond 2^31, CUDA graphs."""

import threading

import pytest
import torch

from tilestack.kernels import load_balancing_loss, moe, router
from tilestack.kernels.device import Device
from tilestack.kernels.moe.op import OP
from tilestack.kernels.moe.sm90_layout import Layout
from tilestack.kernels.moe.sm90_rows import up
from tilestack.testing.compare import assert_close, poisoned_memory

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
NAMES = ("x", "gate_up", "down", "topk_weights")
ROUTINGS, PARTS = 500, 10  # parts: so that several processes share the work; each part has its seed
SHAPES = (  # H, I, E, K, for each of which Hopper's kernels are compiled
    (64, 64, 1, 1), (64, 192, 8, 2), (64, 256, 40, 5), (128, 64, 3, 1), (128, 192, 40, 8), (128, 256, 8, 5),
    (128, 192, 3, 2), (320, 64, 40, 2), (320, 192, 1, 1), (320, 192, 8, 8), (320, 256, 3, 2), (320, 256, 40, 1),
)  # fmt: skip


def implementations():
    if not torch.cuda.is_available():
        return ["tilestack-triton"]
    device = Device.current()
    own = [each.name for each in OP.implementations if each.refuses_machine(device) is None]
    return [name for name in own if name != "reference"]


def random_ids(tokens, top_k, experts, kind, generator):
    if kind == "balanced":
        return torch.rand(tokens, experts, generator=generator).argsort(-1)[:, :top_k]
    if kind == "skewed":
        chance = torch.rand(tokens, experts, generator=generator) ** (1.0 + torch.arange(experts))
        return chance.argsort(-1, descending=True)[:, :top_k]
    low, high = {"duplicates": (0, 2), "few": (0, 1 + experts // 4), "elsewhere": (-2, experts + 3)}[kind]
    return torch.randint(low, max(high, 1), (tokens, top_k), generator=generator).clamp(max=experts + 2)


def random_problem(generator, dtype):
    """Tensors by name and dout: any number of tokens and any routes, of unit scale at every stage."""

    def pick(*choices):
        return choices[torch.randint(len(choices), (), generator=generator)]

    def random(*size, scale=1.0):
        return (scale * torch.randn(*size, generator=generator)).to("cuda", dtype)

    tokens = int(torch.randint(1, 700, (), generator=generator))
    H, I, E, top_k = pick(*SHAPES)
    ids = random_ids(tokens, top_k, E, pick("balanced", "skewed", "duplicates", "few", "elsewhere"), generator)
    tensors = {
        "x": random(tokens, H),
        "gate_up": random(E, 2 * I, H, scale=H**-0.5),
        "down": random(E, H, I, scale=I**-0.5),
        "topk_ids": ids.int().cuda(),
        "topk_weights": (torch.rand(tokens, top_k, generator=generator) + 0.1).cuda(),
    }
    return tensors, random(tokens, H)


def run(tensors, dout, implementation, dtype=None):
    """Out and gradients by name; in `dtype`, if it is given."""
    wide = {torch.float64: torch.float64}.get(dtype, torch.float32)
    dtypes = {name: wide if name == "topk_weights" else dtype for name in NAMES}
    leaves = {name: tensors[name].detach().to(dtypes[name] if dtype else None).requires_grad_() for name in NAMES}
    with poisoned_memory():
        out = moe(**leaves, topk_ids=tensors["topk_ids"], implementation=implementation)
        gradients = torch.autograd.grad(out, list(leaves.values()), dout.to(out.dtype))
    return {"out": out.detach()} | dict(zip(NAMES, gradients, strict=True))


@pytest.mark.parametrize("seed", range(PARTS))
@pytest.mark.parametrize("implementation", implementations())
def test_random_routings_are_within_twice_the_error_of_eager(implementation, seed):
    generator = torch.Generator().manual_seed(seed)
    for number in range(ROUTINGS // PARTS):
        tensors, dout = random_problem(generator, torch.bfloat16)
        ours = run(tensors, dout, implementation)
        eager, exact = (run(tensors, dout, "reference", each) for each in (torch.bfloat16, torch.float64))
        for name in exact:
            try:
                assert_close(name, ours[name], eager[name], exact[name])
            except AssertionError as error:
                shapes = {key: list(each.shape) for key, each in tensors.items()}
                raise AssertionError(f"seed {seed}, routing {number}, {shapes}: {error}") from error


@pytest.mark.parametrize("implementation", implementations())
def test_a_hundred_runs_give_the_same_bits(implementation):
    generator = torch.Generator().manual_seed(0)
    tensors, dout = random_problem(generator, torch.bfloat16)
    first = run(tensors, dout, implementation)
    for _ in range(99):
        again = run(tensors, dout, implementation)
        assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("implementation", implementations())
def test_rows_beyond_two_to_the_31_elements_are_right(implementation):
    generator = torch.Generator("cuda").manual_seed(0)
    tokens, top_k, H, I, E = 2**17 + 1000, 8, 2048, 64, 16
    assert tokens * top_k * H > 2**31

    def random(*size, scale=1.0):
        return torch.randn(*size, generator=generator, device="cuda", dtype=torch.bfloat16).mul_(scale)

    x, dout = random(tokens, H), random(tokens, H)
    weights = {"gate_up": random(E, 2 * I, H, scale=H**-0.5), "down": random(E, H, I, scale=I**-0.5)}
    ids = torch.randint(0, E, (tokens, top_k), generator=generator, device="cuda", dtype=torch.int32)
    chosen = torch.rand(tokens, top_k, generator=generator, device="cuda")

    def of(rows):
        """The op on these tokens alone."""
        tensors = {"x": x[rows], **weights, "topk_ids": ids[rows], "topk_weights": chosen[rows]}
        return run(tensors, dout[rows], implementation)

    whole, last = of(slice(None)), of(slice(tokens - 3000, None))
    for name in ("out", "x", "topk_weights"):  # a token's results do not depend on the others
        assert torch.equal(whole[name][-3000:], last[name])
    middle = tokens // 2
    left, right = of(slice(None, middle)), of(slice(middle, None))
    for name in ("gate_up", "down"):
        total = left[name].double() + right[name].double()
        error = (whole[name].double() - total).square().mean().sqrt() / total.square().mean().sqrt()
        assert error < 2 * torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("implementation", implementations())
def test_a_captured_graph_replays_router_and_experts_on_new_tokens(implementation):
    generator = torch.Generator().manual_seed(0)
    T, H, I, E, K = 300, 128, 64, 8, 2

    def random(*size, scale=1.0):
        return (scale * torch.randn(*size, generator=generator)).to("cuda", torch.bfloat16)

    x, other, dout, gate = random(T, H), random(T, H), random(T, H), random(E, H, scale=H**-0.5)
    leaves = [x, gate, random(E, 2 * I, H, scale=H**-0.5), random(E, H, I, scale=I**-0.5)]
    leaves = [each.requires_grad_() for each in leaves]

    def step():
        routed = router(leaves[0] @ gate.T, top_k=K)
        out = moe(*(leaves[0], *leaves[2:]), routed.topk_ids, routed.topk_weights, implementation=implementation)
        loss = (out * dout).float().sum() + load_balancing_loss(routed.tokens_per_expert, routed.probability_sum, T)
        return out, *torch.autograd.grad(loss, leaves)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        x.copy_(other)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))


@pytest.mark.skipif("tilestack" not in implementations(), reason="is about the Hopper kernels' TMA descriptors")
def test_a_thread_that_has_not_used_the_gpu_yet_may_launch():
    tensors, _ = random_problem(torch.Generator().manual_seed(0), torch.bfloat16)
    x, gate_up, topk_ids = (tensors[name] for name in ("x", "gate_up", "topk_ids"))
    layout = Layout.of(topk_ids, len(gate_up), topk_ids.numel())
    found = []

    def call():
        found.append(up(x, gate_up, layout, topk_ids.shape[1])[0][: layout.routes])

    call()
    up(x, gate_up, layout, topk_ids.shape[1])  # leaves its memory to the thread, whose first call to CUDA is the launch
    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    assert len(found) == 2, "the thread's call failed"
    has_route = layout.row_to_route[: layout.routes] >= 0
    assert torch.equal(found[0][has_route], found[1][has_route])
