"""generate() with transformers' caches gives the tokens of plain transformers."""

import pytest
import torch
from tiny_qwen3_moe import ours_like, plain_model, tokens
from torch._dynamo.utils import counters
from transformers import CompileConfig

from tilestack.models import cache_name

NEW = 12


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("changes", [{}, {"use_sliding_window": True, "sliding_window": 6}], ids=["full", "window"])
def test_greedy_tokens_of_a_left_padded_batch_are_the_same(cache, changes):
    plain = plain_model(**changes).eval()
    ids, mask = tokens(3, 9), torch.ones(3, 9, dtype=torch.long)
    for row, padding in enumerate((0, 2, 5)):
        ids[row, :padding], mask[row, :padding] = 0, 0
    settings = {"max_new_tokens": NEW, "do_sample": False, "cache_implementation": cache, "disable_compile": True}
    right = plain.generate(ids, attention_mask=mask, **settings)
    found = ours_like(plain).generate(ids, attention_mask=mask, **settings)
    assert right.shape == (3, 9 + NEW)
    assert torch.equal(found, right)


def test_greedy_tokens_without_a_cache_are_the_same():
    plain = plain_model().eval()
    ids = tokens(2, 7)
    settings = {"max_new_tokens": NEW, "do_sample": False}
    assert torch.equal(ours_like(plain).generate(ids, use_cache=False, **settings), plain.generate(ids, **settings))


def test_a_prompt_in_pieces_gives_the_logits_of_the_whole():
    ours = ours_like(plain_model()).eval()
    ids = tokens(2, 12)
    whole = ours(ids).logits
    cache, pieces = None, []
    for piece in ids.split((5, 4, 1, 2), dim=1):
        outputs = ours(piece, past_key_values=cache, use_cache=True)
        cache = outputs.past_key_values
        pieces.append(outputs.logits)
    torch.testing.assert_close(torch.cat(pieces, 1), whole)


def test_the_cache_has_both_names_of_transformers():
    ours = ours_like(plain_model()).eval()
    ids = tokens(1, 6)
    whole = ours(ids).logits[:, -1]
    for name in cache_name.NAMES:
        begun = ours(ids[:, :5], use_cache=True)
        cache = getattr(begun, cache_name.NAME)
        torch.testing.assert_close(ours(ids[:, 5:], **{name: cache}).logits[:, -1], whole)
    with pytest.raises(ValueError, match="give only one"):
        ours(ids, cache=cache, past_key_values=cache)


def test_beam_search_and_sampling_run():
    ours = ours_like(plain_model()).eval()
    ids = tokens(1, 5)
    assert ours.generate(ids, max_new_tokens=4, num_beams=3).shape[1] <= 9
    torch.manual_seed(0)
    assert ours.generate(ids, max_new_tokens=4, do_sample=True).shape[1] <= 9


def test_a_compiled_decoding_step_with_a_static_cache_is_one_graph():
    """What generate() does by itself on a GPU."""
    plain = plain_model().eval()
    ids, mask = tokens(2, 6), torch.ones(2, 6, dtype=torch.long)
    ids[0, :2], mask[0, :2] = 0, 0
    whole = CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    whole._compile_all_devices = True
    settings = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
    torch._dynamo.reset()
    counters.clear()
    found = ours_like(plain).generate(ids, cache_implementation="static", compile_config=whole, **settings)
    assert counters["stats"]["unique_graphs"] >= 1
    assert torch.equal(found, plain.generate(ids, **settings))
