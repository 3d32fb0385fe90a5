"""Packing: documents one after the other into micro-batches of a fixed number of tokens, without padding.

The stream of micro-batches depends on the seed alone, never on the number of processes: micro-batch i of a step goes to
rank i modulo the world size. Every rank therefore reads the whole stream; in return every rank knows, on the host,
how many labels the whole step has.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from tilestack.app.config import DataConfig
from tilestack.app.data.documents import Source
from tilestack.app.errors import UserError

IGNORED = -100
MicroBatch = dict[str, torch.Tensor | int]


@dataclass(frozen=True)
class Position:
    """Where the next token comes from: what a checkpoint keeps of the data.

    epoch: how often the data was read through
    document: place in that epoch's order
    token: place in that document
    """

    def __str__(self) -> str:
        return f"epoch {self.epoch}, document {self.document}, token {self.token}"

    epoch: int = 0
    document: int = 0
    token: int = 0


@dataclass(frozen=True)
class StepBatch:
    """What one rank computes in one optimizer step.

    micro_batches: of this rank
    num_items: labels that count, over all ranks
    tokens: over all ranks
    attended: sum over all pieces of all ranks of their squared lengths, the size of attention
    position: where the next step begins
    begin: where this one begins
    """

    micro_batches: list[MicroBatch]
    num_items: int
    tokens: int
    attended: int
    position: Position
    begin: Position = Position()

    @property
    def mean_length(self) -> float:
        """The mean, over tokens, of the length of the piece a token lies in: S of the FLOP count."""
        return self.attended / self.tokens


class PackedLoader:
    """Training steps without end, each read on a thread while the device computes the one before.

    micro_batches: of one step, over all ranks.
    """

    def __init__(
        self,
        source: Source,
        tokenizer: PreTrainedTokenizerBase,
        data: DataConfig,
        rank: int,
        world_size: int,
        micro_batches: int,
        seed: int,
        position: Position | None = None,
    ):
        self._source, self._tokenizer, self._data, self._seed = source, tokenizer, data, seed
        self._micro_batches, self._rank, self._world_size = micro_batches, rank, world_size
        self._start = position or Position()

    def __iter__(self) -> Iterator[StepBatch]:
        packs = self._packs()
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="data") as reader:
            upcoming = reader.submit(self._step, packs, self._start)
            while True:
                step = upcoming.result()
                upcoming = reader.submit(self._step, packs, step.position)
                yield step

    def _step(self, packs: Iterator[tuple[list[list[int]], Position]], begin: Position) -> StepBatch:
        step = [next(packs) for _ in range(self._micro_batches)]
        labels = sum(len(piece) - 1 for pieces, _ in step for piece in pieces)
        mine = [_pinned(pack(pieces)) | {"num_items": labels} for pieces, _ in step[self._rank :: self._world_size]]
        attended = sum(len(piece) ** 2 for pieces, _ in step for piece in pieces)
        tokens = self._micro_batches * self._data.micro_batch_tokens
        return StepBatch(mine, labels, tokens, attended, step[-1][1], begin)

    def _packs(self) -> Iterator[tuple[list[list[int]], Position]]:
        """Pieces that fill one micro-batch each, with the position after it."""
        pieces: list[list[int]] = []
        room = self._data.micro_batch_tokens
        for position, tokens in self._documents():
            begin = position.token
            while begin < len(tokens):
                piece = tokens[begin : begin + min(room, self._data.sequence_length)]
                begin += len(piece)
                pieces.append(piece)
                room -= len(piece)
                if room == 0:
                    yield pieces, Position(position.epoch, position.document, begin)
                    pieces, room = [], self._data.micro_batch_tokens

    def _documents(self) -> Iterator[tuple[Position, list[int]]]:
        """Documents as tokens with their position, epoch after epoch; `token` is where to begin in it."""
        position = self._start
        while True:
            found = False
            for text in self._source.epoch(self._seed, position.epoch, position.document):
                found = True
                yield position, tokenize(self._tokenizer, text)
                position = Position(position.epoch, position.document + 1)
            if not found and position.document == 0:
                raise UserError(f"data.source: {self._data.source} has no document to train on")
            position = Position(position.epoch + 1)


def held_out_batches(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    data: DataConfig,
    rank: int,
    world_size: int,
    limit: int,
) -> list[MicroBatch]:
    """This rank's share of the held-out documents: at most `limit` micro-batches over all ranks, as many on each rank.

    The last one may be shorter than the others; what does not divide evenly over the ranks is left out.
    """
    rows: list[list[list[int]]] = []
    pieces: list[list[int]] = []
    room = data.micro_batch_tokens
    for text in source.held_out():
        tokens = tokenize(tokenizer, text)
        while tokens and len(rows) < limit:
            at = min(room, data.sequence_length)
            piece, tokens = tokens[:at], tokens[at:]
            pieces.append(piece)
            room -= len(piece)
            if room == 0:
                rows.append(pieces)
                pieces, room = [], data.micro_batch_tokens
    if len(rows) < limit and any(len(piece) > 1 for piece in pieces):
        rows.append(pieces)
    even = len(rows) // world_size * world_size
    return [pack(row) for row in rows[:even][rank::world_size]]


def pack(pieces: list[list[int]]) -> MicroBatch:
    """Pieces of documents as one row of T tokens: input_ids, position_ids and labels [1, T], cu_seqlens [n + 1] int32.

    Labels are not shifted (the model shifts); a piece's first token is nobody's label, so that nothing is predicted
    across a boundary.
    """
    flat = torch.tensor([token for piece in pieces for token in piece])
    lengths = torch.tensor([len(piece) for piece in pieces])
    offsets = torch.zeros(len(pieces) + 1, dtype=torch.int64)
    offsets[1:] = lengths.cumsum(0)
    labels = flat.clone()
    labels[offsets[:-1]] = IGNORED
    positions = torch.arange(len(flat)) - offsets[:-1].repeat_interleave(lengths)
    return {
        "input_ids": flat[None],
        "labels": labels[None],
        "position_ids": positions[None],
        "cu_seqlens": offsets.to(torch.int32),
    }


def _pinned(batch: MicroBatch) -> MicroBatch:
    """The batch where the GPU can fetch it without the host waiting."""
    return {name: each.pin_memory() for name, each in batch.items()} if torch.cuda.is_available() else batch


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The document's tokens, ended by the end-of-text token."""
    # the backend of a fast tokenizer gives neither special tokens nor warnings about long texts
    return tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids + [tokenizer.eos_token_id]
