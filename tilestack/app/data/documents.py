"""Where documents come from. A source hands out any document of an epoch's order again, so that a resume is exact.

Local JSONL and text files are read through once at the start: that finds every broken line before training and leaves
an index of where each document lies. Parquet files and hub data sets are streamed by `datasets`, shuffled in a buffer.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import torch

from tilestack.app.config import DataConfig
from tilestack.app.errors import UserError

TEXT_DOCUMENT_BYTES = 8192
PYDOC_DOCUMENT_CHARACTERS = 1500
SHUFFLE_BUFFER = 10_000
SUFFIXES = (".jsonl", ".txt", ".parquet")


class Source(Protocol):
    """Documents in an order that depends on the seed and the epoch alone."""

    def epoch(self, seed: int, epoch: int, start: int) -> Iterator[str]:
        """The documents of one epoch, from position `start` of its order on."""
        ...

    def held_out(self) -> Iterator[str]:
        """The documents that no epoch has."""
        ...

    def identity(self) -> dict[str, int]:
        """What tells this text from another: a resume compares it."""
        ...


def open_source(config: DataConfig) -> Source:
    """The source that the configuration names. Raises UserError if it is missing, empty, or broken."""
    if config.source == "pydoc":
        return Indexed(_PydocTopics(), config.eval_documents, config.source)
    path = Path(config.source)
    if path.exists():
        return _open_files(_files(path), config)
    if path.suffix in SUFFIXES or config.source.startswith((".", "/", "~")) or config.source.count("/") != 1:
        raise UserError(f"data.source: {config.source} does not exist")
    return Streamed({"path": config.source, "name": config.subset, "split": config.split}, config)


def _files(path: Path) -> list[Path]:
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise UserError(f"data.source: {path} must end in {', '.join(SUFFIXES)}")
        return [path]
    found = sorted(each for each in path.rglob("*") if each.suffix in SUFFIXES and each.is_file())
    if not found:
        raise UserError(f"data.source: the folder {path} holds no {', '.join(SUFFIXES)} file")
    if len({each.suffix == ".parquet" for each in found}) > 1:
        raise UserError(f"data.source: the folder {path} mixes Parquet with other files; name one kind")
    return found


def _open_files(files: list[Path], config: DataConfig) -> Source:
    for file in files:
        if file.stat().st_size == 0:
            raise UserError(f"data.source: {file} is empty")
    if files[0].suffix == ".parquet":
        rows = {"path": "parquet", "data_files": [str(file) for file in files], "split": "train"}
        return Streamed(rows, config)
    return Indexed(_Files(files, config.text_key), config.eval_documents, config.source)


class Documents(Protocol):
    """Documents by number. size: of all of them, in characters or bytes."""

    size: int

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> str: ...


class Indexed:
    """Documents that can be read by number: shuffled as a whole, and a resume starts where it wants."""

    def __init__(self, documents: Documents, held_out: int, name: str):
        if len(documents) <= held_out:
            raise UserError(
                f"data.source: {name} holds {len(documents)} documents, and data.eval_documents = {held_out} are held "
                "out; lower data.eval_documents, or give more text"
            )
        self.documents = documents
        # which documents are held out must not depend on train.seed, or runs could not be compared
        order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(0)).tolist()
        self._held_out, self._training = sorted(order[:held_out]), sorted(order[held_out:])

    def epoch(self, seed: int, epoch: int, start: int) -> Iterator[str]:
        generator = torch.Generator().manual_seed(_mix(seed, epoch))
        order = torch.randperm(len(self._training), generator=generator)
        for position in order[start:].tolist():
            yield self.documents[self._training[position]]

    def held_out(self) -> Iterator[str]:
        return (self.documents[number] for number in self._held_out)

    def identity(self) -> dict[str, int]:
        return {"documents": len(self.documents), "size": self.documents.size}


class Streamed:
    """Rows that `datasets` streams: shuffled in a buffer, the first ones held out; a resume reads up to its place."""

    def __init__(self, load: dict, config: DataConfig):
        import datasets  # slow to import, and most runs read local text

        datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it says, our error says
        try:
            # hub scripts are never run: datasets >= 4 has no loading scripts at all
            self._rows = datasets.load_dataset(**load, streaming=True)
            first = next(iter(self._rows), None)
        except Exception as error:  # datasets raises its libraries' many kinds
            raise UserError(f"data.source: {config.source} cannot be read: {error}") from None
        if first is None:
            raise UserError(f"data.source: {config.source} holds no rows")
        if not isinstance(first.get(config.text_key), str):
            raise UserError(
                f"data.source: rows of {config.source} hold no text under {config.text_key!r}, but {sorted(first)}; "
                "set data.text_key"
            )
        self._key, self._held_out = config.text_key, config.eval_documents
        self._name = config.source

    def epoch(self, seed: int, epoch: int, start: int) -> Iterator[str]:
        rows = self._rows.skip(self._held_out).shuffle(seed=_mix(seed, epoch), buffer_size=SHUFFLE_BUFFER).skip(start)
        return self._texts(rows)

    def held_out(self) -> Iterator[str]:
        return self._texts(self._rows.take(self._held_out))

    def identity(self) -> dict[str, int]:
        return {}  # counting would mean to read it all

    def _texts(self, rows) -> Iterator[str]:
        for row in rows:
            text = row[self._key]
            if not isinstance(text, str):
                raise UserError(f"data.source: a row of {self._name} holds no text under {self._key!r}: {row!r:.200}")
            yield text


def _mix(seed: int, epoch: int) -> int:
    return seed * 1_000_003 + epoch


class _PydocTopics:
    """Python's language reference, which `help()` shows: real text that every Python carries, in runs of paragraphs."""

    def __init__(self):
        from pydoc_data.topics import topics

        self._texts = [part for name in sorted(topics) for part in _paragraphs(topics[name])]
        self.size = sum(map(len, self._texts))

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, index: int) -> str:
        return self._texts[index]


def _paragraphs(text: str) -> list[str]:
    """The text in runs of whole paragraphs, each of PYDOC_DOCUMENT_CHARACTERS or a little more."""
    parts, run = [], ""
    for paragraph in text.split("\n\n"):
        run += paragraph + "\n\n"
        if len(run) >= PYDOC_DOCUMENT_CHARACTERS:
            parts.append(run)
            run = ""
    return [*parts, run] if run.strip() else parts


class _Files:
    """The documents of JSONL and text files, by number: a JSON line each, or about 8 KiB of whole lines of text."""

    def __init__(self, files: list[Path], text_key: str):
        self._files, self._key = files, text_key
        self._file, self._offset, self._length = array("L"), array("Q"), array("Q")
        for number, file in enumerate(files):
            scan = _scan_jsonl(file, text_key) if file.suffix == ".jsonl" else _scan_text(file)
            for offset, length in scan:
                self._file.append(number)
                self._offset.append(offset)
                self._length.append(length)
        self.size = sum(self._length)
        if not self._file:
            raise UserError(f"data.source: {', '.join(map(str, files))}: no document has any text")

    def __len__(self) -> int:
        return len(self._file)

    def __getitem__(self, index: int) -> str:
        path = self._files[self._file[index]]
        with path.open("rb") as stream:
            stream.seek(self._offset[index])
            piece = stream.read(self._length[index])
        return json.loads(piece)[self._key] if path.suffix == ".jsonl" else piece.decode("utf-8")


def _scan_jsonl(path: Path, key: str) -> Iterator[tuple[int, int]]:
    """(offset, bytes) of every line with text. Raises UserError with file and line for one that is not a document."""
    offset = 0
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip() and _text_of(line, key, f"{path}:{number}"):
                yield offset, len(line)
            offset += len(line)


def _text_of(line: bytes, key: str, where: str) -> str:
    _decode(line, where)
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: the line is not JSON: {error.msg} at column {error.colno}") from None
    if not isinstance(row, dict) or not isinstance(row.get(key), str):
        got = json.dumps(row, ensure_ascii=False)[:80]
        raise UserError(f"{where}: the line must be an object with text under {key!r} (data.text_key), got {got}")
    return row[key]


def _scan_text(path: Path) -> Iterator[tuple[int, int]]:
    """(offset, bytes) of runs of whole lines, about TEXT_DOCUMENT_BYTES each."""
    begin = end = 0
    blank = True
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            _decode(line, f"{path}:{number}")
            blank = blank and not line.strip()
            end += len(line)
            if end - begin >= TEXT_DOCUMENT_BYTES:
                if not blank:
                    yield begin, end - begin
                begin, blank = end, True
    if not blank:
        yield begin, end - begin


def _decode(line: bytes, where: str) -> None:
    try:
        line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: the line is not UTF-8 ({error.reason} at byte {error.start}); convert it") from None
