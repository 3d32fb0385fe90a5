"""flash_attn_with_kvcache: what is written into the cache, and attention over all of it, by the error rule."""

import naive_attention as naive
import pytest
import torch
from naive_attention import DEVICE, random

from tilestack.compat.flash_attn import flash_attn_with_kvcache
from tilestack.compat.flash_attn.layers.rotary import apply_rotary_emb_torch
from tilestack.testing.compare import assert_close

ROOM, HEADS, KV_HEADS, HEAD_DIM = 48, 4, 2, 16


def integers(*values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def caches(rows=3, room=ROOM, head_dim=HEAD_DIM):
    return [random(rows, room, KV_HEADS, head_dim, seed=seed).detach() for seed in (11, 12)]


def new(length_q, length_new, head_dim=HEAD_DIM):
    q = random(2, length_q, HEADS, head_dim, seed=13).detach()
    return q, *(random(2, length_new, KV_HEADS, head_dim, seed=seed).detach() for seed in (14, 15))


def tables(columns=4, room=ROOM):
    angles = 6 * torch.rand(room, columns, generator=torch.Generator().manual_seed(16))
    return angles.cos().to(DEVICE, torch.bfloat16), angles.sin().to(DEVICE, torch.bfloat16)


def check(out, lse, queries, keys, values, **options):
    """Compare with attention of each sequence: q, k, v of its own keys alone."""
    found, eager, exact = [], [], []
    for index, each in enumerate(zip(queries, keys, values, strict=True)):
        one = [tensor[None] for tensor in each]
        own = dict(options)
        if own.get("alibi_slopes") is not None and own["alibi_slopes"].dim() == 2:
            own["alibi_slopes"] = own["alibi_slopes"][index]
        found.append((out[index], lse[index]))
        eager.append([part[0] for part in naive.attention(*one, **own)])
        wide = {name: part.cpu() if torch.is_tensor(part) else part for name, part in own.items()}
        exact.append([part[0] for part in naive.attention(*(part.cpu().double() for part in one), **wide)])
    for position, name in enumerate(("out", "lse")):
        assert_close(name, *(torch.stack([each[position] for each in side]) for side in (found, eager, exact)))


def run(q, k_cache, v_cache, **options):
    out, lse = flash_attn_with_kvcache(q, k_cache, v_cache, **options, return_softmax_lse=True)
    assert lse.shape == (q.shape[0], HEADS, q.shape[1]) and lse.dtype == torch.float32
    assert torch.equal(flash_attn_with_kvcache(q, k_cache.clone(), v_cache.clone(), **options), out)
    return out, lse


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True},
        {"window_size": (6, 2)},
        {"softcap": 2.0, "causal": True},
        {"alibi_slopes": True, "causal": True},
        {"softmax_scale": 0.4, "num_splits": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("appended", [0, 5])
def test_new_keys_are_written_and_all_keys_are_attended(options, appended):
    options = dict(options)
    if options.get("alibi_slopes"):
        options["alibi_slopes"] = torch.rand(2, HEADS, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    splits = options.pop("num_splits", 0)
    k_cache, v_cache = caches(2)
    lengths = (20, 7)
    q, k, v = new(5, max(appended, 1))
    expected = [[each.clone() for each in part] for part in (k_cache, v_cache)]
    given = {"k": k, "v": v} if appended else {}
    for index, length in enumerate(lengths if appended else ()):
        expected[0][index][length : length + appended] = k[index]
        expected[1][index][length : length + appended] = v[index]
    out, lse = run(q, k_cache, v_cache, **given, cache_seqlens=integers(*lengths), num_splits=splits, **options)
    assert torch.equal(k_cache, torch.stack(expected[0])) and torch.equal(v_cache, torch.stack(expected[1]))
    seen = [[each[: length + appended] for each, length in zip(part, lengths, strict=True)] for part in expected]
    check(out, lse, q, *seen, **options)


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_keys_rotate_where_they_land_and_queries_at_their_own_place_if_they_have_one(causal, interleaved):
    k_cache, v_cache = caches(2)
    lengths = (20, 7)
    q, k, v = new(5, 5)
    cos, sin = tables()
    out, lse = run(
        q, k_cache, v_cache, k=k, v=v, rotary_cos=cos, rotary_sin=sin, cache_seqlens=integers(*lengths), causal=causal,
        rotary_interleaved=interleaved,
    )  # fmt: skip
    queries, keys, values = [], [], []
    for index, length in enumerate(lengths):
        own = slice(length, length + 5) if causal else slice(length, length + 1)
        places = [
            [each[rows].float().expand(5, -1) for each in (cos, sin)] for rows in (own, slice(length, length + 5))
        ]
        query, key = (  # in float32, rounded once
            apply_rotary_emb_torch(each[index, None].float(), *place, interleaved)[0].to(each.dtype)
            for each, place in zip((q, k), places, strict=True)
        )
        assert torch.equal(k_cache[index, length : length + 5], key)
        queries.append(query)
        assert torch.equal(v_cache[index, length : length + 5], v[index])
        keys.append(k_cache[index, : length + 5])
        values.append(v_cache[index, : length + 5])
    check(out, lse, queries, keys, values, causal=causal)


def test_rows_of_the_cache_may_be_chosen_and_padded_on_the_left():
    k_cache, v_cache = caches(4)
    q, k, v = new(3, 3)
    rows, lengths, pads = (3, 1), (20, 9), (4, 0)
    untouched = k_cache[[0, 2]].clone()
    out, lse = run(
        q, k_cache, v_cache, k=k, v=v, cache_seqlens=integers(*lengths), cache_batch_idx=integers(*rows),
        cache_leftpad=integers(*pads), causal=True,
    )  # fmt: skip
    assert torch.equal(k_cache[[0, 2]], untouched) and torch.equal(v_cache[3, 20:23], v[0])
    seen = [
        [cache[row, pad : length + 3] for row, pad, length in zip(rows, pads, lengths, strict=True)]
        for cache in (k_cache, v_cache)
    ]
    check(out, lse, q, *seen, causal=True)


def test_pages_are_written_and_read_through_their_table():
    page, lengths = 256, (255, 300)
    k_pages, v_pages = caches(5, page)
    table = integers(4, 0, 2, 3).view(2, 2)
    q, k, v = new(3, 3)
    out, lse = run(q, k_pages, v_pages, k=k, v=v, cache_seqlens=integers(*lengths), block_table=table, causal=True)
    flat = [[pages[row.long()].flatten(0, 1) for row in table] for pages in (k_pages, v_pages)]
    for index, length in enumerate(lengths):
        assert torch.equal(flat[0][index][length : length + 3], k[index])
        assert torch.equal(flat[1][index][length : length + 3], v[index])
    seen = [[each[: length + 3] for each, length in zip(part, lengths, strict=True)] for part in flat]
    check(out, lse, q, *seen, causal=True)


def test_one_length_may_stand_for_all_and_none_is_the_whole_cache():
    k_cache, v_cache = caches(2, head_dim=20)
    q, *_ = new(1, 1, head_dim=20)
    out, lse = run(q, k_cache, v_cache, cache_seqlens=9)
    check(out, lse, q, k_cache[:, :9], v_cache[:, :9])
    out, lse = run(q, k_cache, v_cache)
    check(out, lse, q, k_cache, v_cache)


def test_a_sequence_without_keys_gives_zero_and_an_infinite_lse():
    k_cache, v_cache = caches(2)
    q, *_ = new(2, 1)
    out, lse = run(q, k_cache, v_cache, cache_seqlens=integers(0, 5), causal=True)
    assert (out[0] == 0).all() and (lse[0] == torch.inf).all() and lse[1].isfinite().all()


BAD = {
    "v must be given where k is": {"v": None},
    "cache_seqlens must be given where k is": {"cache_seqlens": None},
    "rotary_cos must be None where k is": {"k": None, "v": None, "rotary_cos": tables()[0], "rotary_sin": tables()[1]},
    "the page size must be a multiple of 256, got 48": {"block_table": integers(0, 1).view(2, 1)},
    "q must be float16 or bfloat16": {"q": torch.zeros(2, 3, HEADS, HEAD_DIM, device=DEVICE)},
}


@pytest.mark.parametrize("message", BAD)
def test_wrong_input_gets_one_clear_error_and_leaves_the_cache_alone(message):
    q, k, v = new(3, 3)
    k_cache, v_cache = caches(2)
    before = k_cache.clone()
    arguments = {"q": q, "k": k, "v": v, "cache_seqlens": integers(3, 4)} | BAD[message]
    with pytest.raises(RuntimeError, match=f"flash_attn: {message}"):
        flash_attn_with_kvcache(arguments.pop("q"), k_cache, v_cache, **arguments)
    assert torch.equal(k_cache, before)
