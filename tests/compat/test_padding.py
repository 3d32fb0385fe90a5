"""bert_padding: tokens out of a padded batch and back."""

import sys

import pytest
import torch

from tilestack.compat.flash_attn import bert_padding
from tilestack.compat.flash_attn.bert_padding import (
    index_first_axis,
    index_first_axis_residual,
    index_put_first_axis,
    pad_input,
    unpad_input,
    unpad_input_for_concatenated_sequences,
)

MASK = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 1, 0]])


def batch():
    return torch.arange(3 * 4 * 2, dtype=torch.float64).view(3, 4, 2).requires_grad_()


def test_unpadding_takes_the_tokens_and_padding_puts_them_back():
    x = batch()
    tokens, indices, cu_seqlens, max_seqlen, seqused = unpad_input(x, MASK)
    assert torch.equal(tokens, x[MASK.bool()])
    assert indices.tolist() == [0, 1, 4, 5, 6, 7, 10]
    assert cu_seqlens.tolist() == [0, 2, 6, 7] and cu_seqlens.dtype == torch.int32
    assert (type(max_seqlen), max_seqlen) == (int, 4)
    assert seqused.tolist() == [2, 4, 1] and seqused.dtype == torch.int32
    padded = pad_input(tokens, indices, 3, 4)
    assert torch.equal(padded, x * MASK[..., None])
    assert torch.equal(torch.autograd.grad(padded.sum(), x)[0], MASK[..., None].expand(x.shape).double())


def test_padding_takes_indices_of_either_width():
    tokens, indices, *_ = unpad_input(batch(), MASK)
    assert torch.equal(pad_input(tokens, indices.int(), 3, 4), pad_input(tokens, indices, 3, 4))


def test_unused_tokens_are_packed_but_not_counted_as_used():
    unused = torch.tensor([[0, 0, 1, 0], [0, 0, 0, 0], [1, 0, 0, 0]])
    tokens, indices, cu_seqlens, max_seqlen, seqused = unpad_input(batch(), MASK.bool(), unused.bool())
    assert (cu_seqlens.tolist(), max_seqlen, seqused.tolist()) == ([0, 3, 7, 9], 4, [2, 4, 1])
    assert indices.tolist() == [0, 1, 2, 4, 5, 6, 7, 8, 10] and len(tokens) == 9


def test_rows_of_several_sequences_are_cut_at_each():
    lengths = torch.tensor([[2, 1, 0, 0], [4, 0, 0, 0], [1, 1, 1, 0]])
    x = batch()
    tokens, indices, cu_seqlens, max_seqlen = unpad_input_for_concatenated_sequences(x, lengths)
    assert (cu_seqlens.tolist(), max_seqlen) == ([0, 2, 3, 7, 8, 9, 10], 4) and cu_seqlens.dtype == torch.int32
    assert indices.tolist() == [0, 1, 2, 4, 5, 6, 7, 8, 9, 10]
    assert torch.equal(tokens, x.flatten(0, 1)[indices])


def test_the_index_functions_have_their_gradients():
    rows, indices = torch.randn(5, 3, dtype=torch.float64).requires_grad_(), torch.tensor([3, 0, 4])
    assert torch.autograd.gradcheck(lambda x: index_first_axis(x, indices), rows)
    assert torch.autograd.gradcheck(lambda x: index_put_first_axis(x[:3], indices, 6), rows)
    tokens, residual = index_first_axis_residual(rows, indices)
    assert torch.equal(residual, rows)
    (found,) = torch.autograd.grad((2 * tokens).sum() + (3 * residual).sum(), rows)
    assert torch.equal(found[:, 0], torch.tensor([5, 3, 3, 5, 5], dtype=torch.float64))


def test_einops_functions_are_found_where_flash_attn_has_them(monkeypatch):
    einops = pytest.importorskip("einops")
    assert bert_padding.rearrange is einops.rearrange and bert_padding.repeat is einops.repeat
    monkeypatch.setitem(sys.modules, "einops", None)
    with pytest.raises(ImportError, match="pip install einops"):
        bert_padding.rearrange  # noqa: B018
    with pytest.raises(AttributeError, match="no attribute 'reduce'"):
        bert_padding.reduce  # noqa: B018
