"""The tokenizer of a run: of the checkpoint, of a folder or the hub, or a byte-level BPE trained on the text."""

from __future__ import annotations

import itertools
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from tilestack.app.config import DataConfig
from tilestack.app.data.documents import Source
from tilestack.app.errors import UserError

END_OF_TEXT = "<|endoftext|>"
TRAINING_DOCUMENTS = 20_000


def open_tokenizer(data: DataConfig, model_path: str | None, source: Source) -> PreTrainedTokenizerBase:
    """The tokenizer to train with. Raises UserError if it cannot be read or has no end-of-text token."""
    name = data.tokenizer or model_path
    if name is None:
        return train_bpe(source, data.vocab_size)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # transformers raises its libraries' many kinds
        where = "data.tokenizer" if data.tokenizer else "model.path"
        empty = Path(name).is_dir() and not any(Path(name).glob("*token*"))
        why = "the folder has no tokenizer.json" if empty else error
        raise UserError(f"{where}: no tokenizer can be read from {name}: {why}") from None
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of {name} has no end-of-text token (eos_token) to put between documents")
    return tokenizer


def train_bpe(source: Source, vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE (Sennrich et al., 2016; bytes as in GPT-2) trained on the first documents: deterministic."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    documents = itertools.islice(source.epoch(seed=0, epoch=0, start=0), TRAINING_DOCUMENTS)
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT)
