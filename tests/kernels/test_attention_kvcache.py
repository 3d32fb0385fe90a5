"""attention_kvcache and kv_cache_append together, their cut into splits, and what they refuse."""

import pytest
import torch

from tilestack.kernels import UnsupportedError, attention, attention_kvcache, kv_cache_append
from tilestack.kernels.attention_kvcache import configs
from tilestack.kernels.attention_kvcache.op import OP
from tilestack.kernels.device import Device

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
IMPLEMENTATIONS = [each.name for each in OP.implementations]
every_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
FLOAT32 = torch.finfo(torch.float32).eps


@pytest.fixture(autouse=True)
def _runs_here(request):
    if "implementation" in request.fixturenames:
        name = request.getfixturevalue("implementation")
        reason = next(each for each in OP.implementations if each.name == name).refuses_machine(Device.of(DEVICE))
        if reason:
            pytest.skip(reason)


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def integers(*values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def paged_copy(cache, page, seed=0):
    """The same cache [B, S, H, D] in pages of no order: (cache, block_table)."""
    batch, room, *rest = cache.shape
    table = torch.randperm(batch * room // page, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    paged = torch.empty(batch * room // page, page, *rest, device=DEVICE)
    paged[table] = cache.reshape(-1, page, *rest)
    return paged, table.view(batch, -1).int()


@every_implementation
def test_tokens_one_by_one_give_what_one_causal_attention_gives(implementation):
    """A prefill of 5 tokens, then one token after another, in a cache of pages of 4."""
    length, q, k, v = 12, random(2, 12, 4, 16, seed=1), random(2, 12, 2, 16, seed=2), random(2, 12, 2, 16, seed=3)
    whole = attention(q.double().cpu(), k.double().cpu(), v.double().cpu(), causal=True, implementation="reference")
    k_cache, v_cache = (torch.full((6, 4, 2, 16), float("nan"), device=DEVICE) for _ in range(2))
    table = integers(4, 0, 5, 1, 3, 2).view(2, 3)
    steps = [(0, 5), *((i, i + 1) for i in range(5, length))]
    outputs = []
    for begin, end in steps:
        seqlens = integers(begin, begin)
        new = slice(begin, end)
        kv_cache_append(
            k_cache, v_cache, k[:, new], v[:, new], cache_seqlens=seqlens, block_table=table,
            implementation=implementation,
        )  # fmt: skip
        outputs.append(
            attention_kvcache(
                q[:, new],
                k_cache,
                v_cache,
                cache_seqlens=seqlens,
                new_keys=end - begin,
                block_table=table,
                causal=True,
                implementation=implementation,
            )  # fmt: skip
        )
    assert (torch.cat(outputs, 1).cpu() - whole).abs().max() < 10 * FLOAT32 * v.abs().max()


@every_implementation
@pytest.mark.parametrize("interleaved", [True, False])
def test_rotated_keys_and_queries_depend_on_their_distance_alone(implementation, interleaved):
    """Rotary embedding: a sequence that begins at another position has the same attention."""
    q, k, v = random(2, 6, 2, 16, seed=1)[:1], random(1, 6, 2, 16, seed=2), random(1, 6, 2, 16, seed=3)
    angles = torch.arange(64)[:, None] * 10.0 ** -torch.arange(8)
    tables = {"rotary_cos": angles.cos().to(DEVICE), "rotary_sin": angles.sin().to(DEVICE)}
    tables["rotary_interleaved"] = interleaved
    outputs = []
    for start in (0, 20):
        k_cache, v_cache = torch.zeros(1, 64, 2, 16, device=DEVICE), torch.zeros(1, 64, 2, 16, device=DEVICE)
        at = {"cache_seqlens": integers(start), "implementation": implementation, **tables}
        kv_cache_append(k_cache, v_cache, k, v, **at)
        assert torch.equal(v_cache[:, start : start + 6], v)
        outputs.append(
            attention_kvcache(q, k_cache, v_cache, new_keys=6, cache_leftpad=integers(start), causal=True, **at)
        )
    unrotated = attention(q, k, v, causal=True, implementation=implementation)
    assert (outputs[0] - outputs[1]).abs().max() < 1e-4 < (outputs[0] - unrotated).abs().max()


@every_implementation
def test_pages_hold_what_a_row_holds(implementation):
    k_cache, v_cache, q = random(2, 48, 2, 16, seed=1), random(2, 48, 2, 16, seed=2), random(2, 3, 4, 16, seed=3)
    seqlens = integers(37, 20)
    expected = attention_kvcache(q, k_cache, v_cache, cache_seqlens=seqlens, implementation=implementation)
    (k_pages, table), (v_pages, _) = paged_copy(k_cache, 16), paged_copy(v_cache, 16)
    found = attention_kvcache(
        q, k_pages, v_pages, cache_seqlens=seqlens, block_table=table, implementation=implementation
    )
    assert torch.equal(found, expected)


@every_implementation
def test_no_gradient_flows_and_nobody_is_told_that_one_does(implementation):
    q, k_cache, v_cache = random(1, 1, 2, 16).requires_grad_(), random(1, 9, 2, 16), random(1, 9, 2, 16)
    out, lse = attention_kvcache(q, k_cache, v_cache, return_lse=True, implementation=implementation)
    assert not out.requires_grad and not lse.requires_grad


@every_implementation
def test_caches_of_inference_mode_are_written_too(implementation):
    with torch.inference_mode():
        k_cache, v_cache = random(1, 9, 2, 16, seed=1), random(1, 9, 2, 16, seed=2)
        k, v = random(1, 2, 2, 16, seed=3), random(1, 2, 2, 16, seed=4)
        kv_cache_append(k_cache, v_cache, k, v, cache_seqlens=integers(3), implementation=implementation)
        assert torch.equal(k_cache[:, 3:5], k) and torch.equal(v_cache[:, 3:5], v)


def test_autograd_sees_that_a_cache_was_written():
    k_cache, v_cache, k = random(1, 9, 2, 16), random(1, 9, 2, 16), random(1, 1, 2, 16)
    before = k_cache._version, v_cache._version
    kv_cache_append(k_cache, v_cache, k, k, cache_seqlens=integers(3))
    assert k_cache._version > before[0] and v_cache._version > before[1]


@pytest.mark.skipif(DEVICE.type != "cuda", reason="CUDA graphs need a GPU")
def test_a_captured_step_is_replayed_with_other_lengths():
    k_cache, v_cache = random(2, 4096, 2, 64, seed=1).half(), random(2, 4096, 2, 64, seed=2).half()
    q, k, v = random(2, 1, 8, 64, seed=3).half(), random(2, 1, 2, 64, seed=4).half(), random(2, 1, 2, 64, seed=5).half()
    seqlens = integers(5, 900)

    def step():
        kv_cache_append(k_cache, v_cache, k, v, cache_seqlens=seqlens)
        return attention_kvcache(q, k_cache, v_cache, cache_seqlens=seqlens, new_keys=1, causal=True)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    seqlens.copy_(integers(3000, 17))
    graph.replay()
    replayed = out.clone()
    assert torch.equal(replayed, step())
    assert torch.equal(k_cache[0, 3000], k[0, 0])


@pytest.mark.parametrize("slots", [132, 264])
@pytest.mark.parametrize("programs", [1, 4, 64, 128, 200, 256, 300, 5000])
@pytest.mark.parametrize("blocks", [1, 3, 64, 2048])
def test_splits_fill_the_machine_and_are_not_cut_too_small(programs, slots, blocks):
    n = configs.splits(programs, slots, blocks)
    assert 1 <= n <= max(1, blocks // configs.MIN_BLOCKS)
    if programs >= 8 * slots:
        assert n == 1  # long queues of programs are balanced as they are
    if programs * 8 <= slots and blocks >= 2048:
        assert programs * n >= 0.75 * min(slots, 128 * programs)


WRONG = {
    "q": random(2, 1, 4, 16), "k_cache": random(2, 32, 2, 16), "v_cache": random(2, 32, 2, 16),
    "cache_seqlens": integers(3, 5),
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": random(2, 1, 3, 16)}, r"q must have a multiple of the heads of k_cache \(2\), got 3"),
        ({"q": random(2, 1, 4, 8)}, r"q must be \[2, 1, 4, 16\] \(the head dimension of k_cache\), got \[2, 1, 4, 8\]"),
        ({"q": random(2, 4, 16)}, r"cu_seqlens_q is missing: packed q \[2, 4, 16\] needs it"),
        ({"q": random(2, 1, 4, 16).half()}, "q must have the dtype of k_cache"),
        ({"v_cache": random(2, 31, 2, 16)}, r"v_cache must be \[2, 32, 2, 16\] \(the shape of k_cache\)"),
        ({"k_cache": random(2, 32, 32)}, r"k_cache must be \[B_cache, S_cache, Hkv, D\]"),
        ({"q": random(3, 1, 4, 16), "cache_seqlens": integers(1, 2, 3)}, r"k_cache must be \[3, 32, 2, 16\] \(one row"),
        ({"cache_seqlens": integers(3, 5).long()}, "cache_seqlens must be torch.int32, got torch.int64"),
        ({"cache_seqlens": integers(3)}, r"cache_seqlens must be \[2\] \(\[B\], one for each sequence\), got \[1\]"),
        ({"cache_seqlens": torch.zeros(2, dtype=torch.int32, device="meta")}, "cache_seqlens must have the device of"),
        ({"cache_seqlens": None, "new_keys": 1}, "cache_seqlens is missing: new_keys counts from it"),
        ({"new_keys": -1}, "new_keys must be at least 0, got -1"),
        ({"new_keys": torch.tensor(1)}, "new_keys must be an integer, got Tensor"),
        ({"block_table": integers(0, 1)}, r"block_table must be \[B, max_pages\], got 1 dimensions"),
        ({"block_table": integers(0).view(1, 1)}, r"block_table must be \[2, 1\]"),
        ({"block_table": integers(0, 1).view(2, 1).long()}, "block_table must be torch.int32"),
        (
            {"block_table": integers(0, 1).view(2, 1), "cache_batch_idx": integers(0, 1)},
            "cache_batch_idx must be None with block_table",
        ),
        (
            {"block_table": integers(0, 1).view(2, 1), "cache_leftpad": integers(0, 1)},
            "cache_leftpad must be None with block_table",
        ),
        ({"cu_seqlens_q": integers(0, 1, 2)}, r"cu_seqlens_q belongs to packed q, \[Tq, Hq, D\], but q is \[2, 1, 4"),
        ({"window_size": (-2, 0)}, "window_size must be at least -1, got -2"),
        ({"window_size": 3}, r"window_size must be two integers, \(left, right\), got 3"),
        ({"softmax_scale": 0.0}, "softmax_scale must be a finite number greater than 0, got 0.0"),
        ({"softcap": -1.0}, r"softcap must be a finite number, 0 \(off\) or more, got -1.0"),
        ({"sinks": random(3)}, r"sinks must be \[4\] \(one for each head of q\), got \[3\]"),
        ({"alibi_slopes": random(3)}, r"alibi_slopes must be \[Hq\] or \[B, Hq\] = \[4\] or \[2, 4\], got \[3\]"),
        ({"alibi_slopes": random(4).half()}, "alibi_slopes must be torch.float32, got torch.float16"),
        ({"num_splits": 129}, "num_splits must be at most 128, got 129"),
        ({"num_splits": -1}, "num_splits must be at least 0, got -1"),
        ({"rotary_cos": random(32, 8)}, "rotary_sin is missing: rotary_cos is given, give both or none"),
        (
            {"rotary_cos": random(31, 8), "rotary_sin": random(31, 8)},
            "S_ro, the rows of rotary_cos, which must cover the cache, must be at least 32, got 31",
        ),
        (
            {"rotary_cos": random(32, 9), "rotary_sin": random(32, 9)},
            "rotary_cos must have 1 to D / 2 = 8 columns, got 9",
        ),
        ({"implementation": "tilestack-tritn"}, "did you mean 'tilestack-triton'"),
    ],
)
def test_wrong_input_to_attention_gets_one_clear_error(change, message):
    with pytest.raises(ValueError, match=f"attention_kvcache: .*{message}"):
        attention_kvcache(**(WRONG | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": random(2, 1, 3, 16)}, r"k must be \[2, 1, 2, 16\] \(\[B, S_new, Hkv, D\], heads as in k_cache\)"),
        ({"k": random(2, 2, 16)}, r"k must be \[B, S_new, Hkv, D\], got 3 dimensions"),
        ({"v": random(2, 2, 2, 16)}, r"v must be \[2, 1, 2, 16\] \(the shape of k\)"),
        ({"v": random(2, 1, 2, 16).half()}, "v must have the dtype of k_cache"),
        ({"cache_seqlens": integers(1, 2, 3)}, r"cache_seqlens must be \[2\]"),
        ({"cache_batch_idx": integers(1)}, r"cache_batch_idx must be \[2\]"),
        ({"rotary_sin": random(32, 8)}, "rotary_cos is missing"),
        ({"rotary_cos": random(32, 8).half(), "rotary_sin": random(32, 8).half()}, "rotary_cos must be torch.float32"),
    ],
)
def test_wrong_input_to_append_gets_one_clear_error_and_writes_nothing(change, message):
    caches = {"k_cache": torch.zeros(2, 32, 2, 16, device=DEVICE), "v_cache": torch.zeros(2, 32, 2, 16, device=DEVICE)}
    given = caches | {"k": random(2, 1, 2, 16), "v": random(2, 1, 2, 16), "cache_seqlens": integers(3, 5)} | change
    with pytest.raises(ValueError, match=f"kv_cache_append: .*{message}"):
        kv_cache_append(**given)
    assert not any(cache.any() for cache in caches.values())


def test_the_triton_kernels_refuse_a_cache_whose_heads_are_not_adjacent_numbers():
    cache = random(2, 32, 16, 2).transpose(2, 3)
    with pytest.raises(UnsupportedError, match=r"adjacent numbers, k_cache has strides \[1024, 32, 1, 2\]"):
        attention_kvcache(random(2, 1, 4, 16), cache, cache, implementation="tilestack-triton")
    with pytest.raises(UnsupportedError, match=r"adjacent numbers, k_cache has strides \[1024, 32, 1, 2\]"):
        new = random(2, 1, 2, 16)
        kv_cache_append(cache, cache, new, new, cache_seqlens=integers(0, 0), implementation="tilestack-triton")


def test_the_triton_kernels_refuse_heads_over_256():
    with pytest.raises(UnsupportedError, match="takes head dimensions up to 256, got 264"):
        attention_kvcache(
            random(1, 1, 1, 264), random(1, 8, 1, 264), random(1, 8, 1, 264), implementation="tilestack-triton"
        )
