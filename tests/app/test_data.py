"""Documents and packing: everything is read once, nothing crosses a boundary, and a resume goes on exactly there."""

import itertools
import json
from pathlib import Path

import pytest
import torch

from app.tiny_run import write_documents
from tilestack.app.config import DataConfig
from tilestack.app.data.documents import open_source
from tilestack.app.data.packing import PackedLoader, held_out_batches, pack
from tilestack.app.data.tokenizer import train_bpe

IGNORED = -100


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """(configuration, source, tokenizer) of 40 short documents, 4 of them held out."""
    path = write_documents(tmp_path_factory.mktemp("data") / "documents.jsonl")
    config = DataConfig(source=str(path), eval_documents=4, sequence_length=48, micro_batch_tokens=100)
    source = open_source(config)
    return config, source, train_bpe(source, 300)


def steps_of(text, count, micro_batches=2, rank=0, world_size=1, seed=0, position=None):
    config, source, tokenizer = text
    loader = PackedLoader(source, tokenizer, config, rank, world_size, micro_batches, seed, position)
    return list(itertools.islice(loader, count))


def tokens_of(steps):
    return torch.cat([batch["input_ids"][0] for step in steps for batch in step.micro_batches])


def same(left, right):
    pairs = list(zip(left, right, strict=True))
    tensors = all(torch.equal(a[key], b[key]) for a, b in pairs for key in a if key != "num_items")
    return tensors and all(a.get("num_items") == b.get("num_items") for a, b in pairs)


def test_a_pack_keeps_documents_apart():
    batch = pack([[5, 6, 7], [8], [9, 10]])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 10]]
    assert batch["labels"].tolist() == [[IGNORED, 6, 7, IGNORED, IGNORED, 10]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 0, 1]]
    assert batch["cu_seqlens"].tolist() == [0, 3, 4, 6] and batch["cu_seqlens"].dtype == torch.int32


def test_micro_batches_have_exactly_the_tokens_asked_for_and_pieces_no_more_than_theirs(text):
    for step in steps_of(text, 12):
        for batch in step.micro_batches:
            assert batch["input_ids"].shape == batch["labels"].shape == batch["position_ids"].shape == (1, 100)
            assert batch["cu_seqlens"].diff().max() <= 48 and batch["cu_seqlens"][-1] == 100


def test_an_epoch_reads_every_training_document_once_and_no_held_out_one(text):
    config, source, tokenizer = text
    documents = list(source.epoch(seed=3, epoch=0, start=0))
    written = [json.loads(line)["text"] for line in Path(config.source).read_text().splitlines()]
    assert sorted(documents + list(source.held_out())) == sorted(written)
    stream = tokens_of(steps_of(text, 5, seed=3)).tolist()
    wanted = [token for text in documents for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    assert stream == wanted[: len(stream)]


def test_epochs_and_seeds_have_different_orders_and_repeat(text):
    source = text[1]
    orders = [tuple(source.epoch(seed, epoch, 0)) for seed in (0, 1) for epoch in (0, 1)]
    assert len(set(orders)) == 4
    assert orders[0] == tuple(source.epoch(0, 0, 0)) and orders[0][5:] == tuple(source.epoch(0, 0, 5))


def test_a_resume_at_any_step_gives_the_steps_that_follow(text):
    steps = steps_of(text, 30)
    assert steps[-1].position.epoch >= 2
    for stop in range(0, 29, 3):
        for before, after in zip(steps[stop + 1 :], steps_of(text, 3, position=steps[stop].position), strict=False):
            assert same(before.micro_batches, after.micro_batches) and before.position == after.position


def test_the_ranks_together_compute_what_one_process_does(text):
    alone = steps_of(text, 5, micro_batches=4)
    shares = [steps_of(text, 5, micro_batches=4, rank=rank, world_size=2) for rank in range(2)]
    for one, first, second in zip(alone, *shares, strict=True):
        merged = [each for pair in zip(first.micro_batches, second.micro_batches, strict=True) for each in pair]
        assert same(one.micro_batches, merged)


def test_num_items_counts_the_labels_of_the_whole_step(text):
    for rank in range(2):
        for step, whole in zip(steps_of(text, 5, rank=rank, world_size=2), steps_of(text, 5), strict=True):
            labels = sum(int((batch["labels"][:, 1:] != IGNORED).sum()) for batch in whole.micro_batches)
            assert step.num_items == labels == step.micro_batches[0]["num_items"]


def test_the_mean_length_is_that_of_the_piece_a_token_lies_in(text):
    step = steps_of(text, 1)[0]
    lengths = torch.cat([batch["cu_seqlens"].diff() for batch in step.micro_batches]).double()
    assert step.mean_length == pytest.approx(float((lengths**2).sum() / lengths.sum()))


def test_the_held_out_text_is_divided_over_the_ranks_evenly(text):
    config, source, tokenizer = text
    whole = held_out_batches(source, tokenizer, config, 0, 1, limit=100)
    shares = [held_out_batches(source, tokenizer, config, rank, 2, limit=100) for rank in range(2)]
    assert len(shares[0]) == len(shares[1]) == len(whole) // 2 > 0
    assert same(shares[0], whole[0::2][: len(shares[0])]) and same(shares[1], whole[1::2])
    assert len(held_out_batches(source, tokenizer, config, 0, 1, limit=1)) == 1


def test_text_files_become_documents_of_whole_lines(tmp_path):
    lines = [f"line {number} of a long text file: naïve café\n" for number in range(1000)]
    (tmp_path / "a.txt").write_text("".join(lines))
    (tmp_path / "b.txt").write_text("a short one\n")
    source = open_source(DataConfig(source=str(tmp_path), eval_documents=0))
    documents = sorted(source.epoch(0, 0, 0))
    assert len(documents) > 3 and "a short one\n" in documents
    assert all(document.endswith("\n") for document in documents)
    assert sorted("".join(documents).splitlines(keepends=True)) == sorted([*lines, "a short one\n"])


def test_parquet_is_streamed_shuffled_and_resumed_exactly(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [f"row {number}" for number in range(50)]
    datasets.Dataset.from_dict({"body": rows}).to_parquet(tmp_path / "rows.parquet")
    config = DataConfig(source=str(tmp_path / "rows.parquet"), text_key="body", eval_documents=5)
    source = open_source(config)
    order = list(source.epoch(1, 0, 0))
    assert list(source.held_out()) == rows[:5] and sorted(order) == sorted(rows[5:]) and order != rows[5:]
    assert list(source.epoch(1, 0, 17)) == order[17:] and list(source.epoch(1, 1, 0)) != order


def test_the_tokenizer_is_deterministic_and_reads_back_any_text(text):
    source, tokenizer = text[1], text[2]
    assert train_bpe(source, 300).backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    for sample in ("plain", "naïve café 語 🙂\n\ttabs", ""):
        assert tokenizer.decode(tokenizer(sample)["input_ids"]) == sample
