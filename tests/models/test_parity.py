"""Logits, loss and every parameter's gradient agree with untouched transformers."""

import pytest
import torch
from tiny_qwen3_moe import assert_same, ours_like, plain_model, tokens

from tilestack import enable

SHAPES = {
    "every layer MoE": {},
    "a dense layer by index": {"mlp_only_layers": [1], "num_hidden_layers": 3},
    "a dense layer by step": {"decoder_sparse_step": 2, "num_hidden_layers": 4},
    "dense layers alone": {"mlp_only_layers": [0, 1]},
    "weights not normalised": {"norm_topk_prob": False},
    "tied embeddings": {"tie_word_embeddings": True},
    "attention bias": {"attention_bias": True},
    "sliding window": {"use_sliding_window": True, "sliding_window": 5},
    "rope linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
    "rope dynamic": {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
    "rope dynamic, longer than its positions": {
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
        "max_position_embeddings": 16,
    },
    "rope yarn": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    },
}


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES.keys())
def test_agrees_with_transformers(changes):
    plain = plain_model(**changes)
    ids = tokens(2, 20)
    dense = changes.get("mlp_only_layers") == [0, 1]
    assert_same(ours_like(plain), plain, {"input_ids": ids, "labels": ids, "output_router_logits": not dense})


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("changes", [{}, {"use_sliding_window": True, "sliding_window": 5}], ids=["full", "window"])
def test_padded_batches_agree(side, changes):
    plain = plain_model(**changes)
    ids, mask = tokens(3, 16), torch.ones(3, 16, dtype=torch.long)
    for row, padding in enumerate((0, 5, 9)):
        mask[row, slice(0, padding) if side == "left" else slice(16 - padding, 16)] = 0
    labels = ids.masked_fill(mask == 0, -100)
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": labels, "output_router_logits": True}
    assert_same(ours_like(plain), plain, inputs, valid=mask)


def packed_positions(*rows: tuple[int, ...]) -> torch.Tensor:
    return torch.stack([torch.cat([torch.arange(length) for length in row]) for row in rows])


PACKED = {"one row": packed_positions((7, 1, 12)), "two rows": packed_positions((7, 1, 12), (15, 5))}


WINDOW = {"use_sliding_window": True, "sliding_window": 5}


@pytest.mark.parametrize(
    ("rows", "use_cache", "ones", "changes"),
    [
        ("one row", False, False, {}),
        ("one row", True, True, {}),
        ("one row", None, False, WINDOW),
        ("two rows", None, False, {}),
        ("two rows", True, True, WINDOW),
    ],
)
def test_packed_batches_agree_whatever_the_cache_and_the_mask_say(rows, use_cache, ones, changes):
    plain = plain_model(**changes)
    positions = PACKED[rows]
    ids = tokens(*positions.shape)
    labels = ids.masked_fill(positions == 0, -100)
    right = {"input_ids": ids, "position_ids": positions, "labels": labels, "use_cache": False}
    inputs = right | {"use_cache": use_cache} | ({"attention_mask": torch.ones_like(ids)} if ones else {})
    assert_same(ours_like(plain), plain, inputs, plain_inputs=right)


@pytest.mark.parametrize("with_positions", [True, False])
def test_cu_seqlens_agree_with_positions_that_restart(with_positions):
    plain = plain_model()
    positions = PACKED["two rows"]
    ids = tokens(*positions.shape)
    right = {"input_ids": ids, "labels": ids, "position_ids": positions, "use_cache": False}
    cu_seqlens = torch.tensor([0, 7, 8, 20, 35, 40], dtype=torch.int32)
    inputs = {"input_ids": ids, "labels": ids, "cu_seq_lens_q": cu_seqlens, "cu_seq_lens_k": cu_seqlens}
    inputs |= {"max_length_q": 15, "max_length_k": 15}
    if with_positions:
        inputs["position_ids"] = positions
    assert_same(ours_like(plain), plain, inputs, plain_inputs=right)


def test_documents_in_one_row_do_not_see_each_other():
    ours = ours_like(plain_model()).eval()
    ids, positions = tokens(1, 20), PACKED["one row"]
    other = ids.clone()
    other[0, :7] = tokens(7, seed=9)
    first = ours(ids, position_ids=positions, use_cache=True).logits
    second = ours(other, position_ids=positions, use_cache=True).logits
    torch.testing.assert_close(first[0, 7:], second[0, 7:])
    assert (first[0, :7] - second[0, :7]).abs().max() > 0.1


def test_padding_and_packing_go_together():
    plain = plain_model()
    positions = packed_positions((6, 9))
    ids, labels = tokens(1, 15), tokens(1, 15).masked_fill(positions == 0, -100)
    padded = {
        "input_ids": torch.nn.functional.pad(ids, (3, 2)),
        "labels": torch.nn.functional.pad(labels, (3, 2), value=-100),
        "position_ids": torch.nn.functional.pad(positions, (3, 2), value=1),
        "attention_mask": torch.nn.functional.pad(torch.ones_like(ids), (3, 2)),
    }
    ours = ours_like(plain)
    right = plain(input_ids=ids, position_ids=positions, labels=labels, use_cache=False)
    found = ours(**padded, return_logits=True)
    torch.testing.assert_close(found.logits[:, 3:-2], right.logits)
    torch.testing.assert_close(found.loss, right.loss)


def test_a_mask_with_a_hole_agrees():
    plain = plain_model()
    ids, mask = tokens(2, 12), torch.ones(2, 12, dtype=torch.long)
    mask[0, 4:6] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, 6] = -100  # predicted at a masked token, which sees nothing here and its row in transformers
    assert_same(ours_like(plain), plain, {"input_ids": ids, "attention_mask": mask, "labels": labels}, valid=mask)


def test_a_four_dimensional_mask_agrees():
    plain = plain_model()
    ids = tokens(2, 12)
    mask = torch.ones(12, 12, dtype=torch.bool).tril().expand(2, 1, 12, 12).clone()
    mask[:, :, 8:, :3] = False
    assert_same(ours_like(plain), plain, {"input_ids": ids, "attention_mask": mask, "labels": ids})


def test_labels_that_are_shifted_already_agree():
    plain = plain_model()
    ids = tokens(2, 12)
    shifted = torch.nn.functional.pad(ids, (0, 1), value=-100)[:, 1:].contiguous()
    assert_same(ours_like(plain), plain, {"input_ids": ids, "labels": ids, "shift_labels": shifted})


def test_embeddings_instead_of_ids_agree():
    plain = plain_model().eval()
    embeddings = torch.randn(2, 12, 64, generator=torch.Generator().manual_seed(0))
    found, right = ours_like(plain)(inputs_embeds=embeddings), plain(inputs_embeds=embeddings)
    torch.testing.assert_close(found.logits, right.logits)


@pytest.mark.parametrize("as_tensor", [True, False])
def test_num_items_in_batch_divides_the_loss(as_tensor):
    plain = plain_model()
    ids = tokens(2, 12)
    items = torch.tensor(57) if as_tensor else 57
    assert_same(ours_like(plain), plain, {"input_ids": ids, "labels": ids, "num_items_in_batch": items})


def test_enabled_models_agree():
    plain, enabled = plain_model(), plain_model()
    enable(enabled)
    ids = tokens(2, 12)
    assert_same(enabled, plain, {"input_ids": ids, "labels": ids, "output_router_logits": True})
