"""The engine's part of a checkpoint: pieces of parameters in safetensors, numbers in JSON, and what may be wrong.

    engine.json                       format, dtype, number of updates; who saved it
    pieces-<rank>-<n>.safetensors     "<parameter>:<start>:<kind>" -> elements [start, ...) of the flattened parameter

A kind is "weight" (the float32 master, where bfloat16 weights have one) or a state of the optimizer ("exp_avg",
"exp_avg_sq"; float32, or bfloat16 where they are kept so). Each rank writes what it holds, in files of its own, so from
ZeRO-1 on no rank ever has the whole; and a reader takes the elements that it needs from whatever files have them. So a
checkpoint does not depend on how many ranks wrote it, on their ZeRO stage, or on how they split the experts.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from tilestack.models.files import sync_file

FORMAT = "pieces-1"
FILE_BYTES = 2 << 30  # a file's tensors are copied to the host together
WEIGHT = "weight"
MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW


class CheckpointError(ValueError):
    """A checkpoint that is incomplete, damaged, or of another model, engine or precision."""


@dataclass(frozen=True)
class Piece:
    """Elements [start, start + n) of one flattened parameter, as a rank holds them.

    tensors: by kind, each [n], views of what the engine trains with: `read_pieces` writes into them.
    """

    name: str
    start: int
    tensors: dict[str, torch.Tensor]


@dataclass(frozen=True)
class Saving:
    """A rank's part of a checkpoint at one moment: views of what trains, or copies of them.

    pieces: gives them one after the other; a piece need not outlive the next.
    shapes: the same pieces, of which only the shapes and types count: what must be decoded to be had may be on "meta".
    state: the engine's numbers, which one rank writes; None on the others.
    """

    rank: int
    pieces: Callable[[], Iterable[Piece]]
    shapes: Callable[[], Iterable[Piece]]
    state: dict[str, Any] | None

    @property
    def nbytes(self) -> int:
        """What `copied` takes of the host's memory."""
        return sum(tensor.nbytes for piece in self.shapes() for tensor in piece.tensors.values())

    def copied(self) -> Saving:
        """The same in host memory of its own: training may go on while it is written. Waits for the device."""
        pieces = [
            Piece(each.name, each.start, {kind: t.detach().to("cpu", copy=True) for kind, t in each.tensors.items()})
            for each in self.pieces()
        ]
        return Saving(self.rank, lambda: pieces, lambda: pieces, self.state)

    def write(self, folder: Path) -> None:
        """Write it into `folder`, which exists, and bring it to the disk; the application makes the folder appear."""
        write_pieces(folder, self.rank, self.pieces())
        if self.state is not None:
            path = folder / "engine.json"
            path.write_text(json.dumps(self.state, indent=2) + "\n", encoding="utf-8")
            sync_file(path)


def numbers(dtype: torch.dtype, updates: int, saved_by: dict[str, Any]) -> dict[str, Any]:
    """The engine's numbers, as engine.json has them."""
    return {"format": FORMAT, "dtype": str(dtype), "updates": updates, "saved_by": saved_by}


def read_state(folder: Path, dtype: torch.dtype) -> int:
    """Read the engine's numbers; returns the number of updates.

    Raises CheckpointError if the file is missing or broken, or of another format or precision.
    """
    path = folder / "engine.json"
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{folder} holds no engine.json: it is not a complete checkpoint") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is broken: {error}") from None
    if not isinstance(state, dict) or not isinstance(state.get("updates"), int):
        raise CheckpointError(f"{path} is broken: it must be an object that has the number of updates")
    for key, value in {"format": FORMAT, "dtype": str(dtype)}.items():
        if state.get(key) != value:
            raise CheckpointError(f"{folder} was saved with {key}={state.get(key)!r}, this run has {key}={value!r}")
    return state["updates"]


def write_pieces(folder: Path, rank: int, pieces: Iterable[Piece]) -> None:
    """Write a rank's pieces into files of its own, of about FILE_BYTES."""
    waiting: dict[str, torch.Tensor] = {}
    files = 0

    def flush() -> None:
        nonlocal files
        path = folder / f"pieces-{rank:05d}-{files:04d}.safetensors"
        save_file(waiting, path)
        sync_file(path)
        waiting.clear()
        files += 1

    for piece in pieces:
        for kind, tensor in piece.tensors.items():
            waiting[f"{piece.name}:{piece.start}:{kind}"] = tensor.detach().cpu().contiguous()
            if sum(each.nbytes for each in waiting.values()) >= FILE_BYTES:
                flush()
    if waiting:
        flush()


@dataclass(frozen=True)
class _Stored:
    start: int
    end: int
    path: Path
    key: str


def read_pieces(folder: Path, pieces: Iterable[Piece], sizes: Mapping[str, int]) -> None:
    """Copy the checkpoint's elements into the pieces' tensors.

    pieces: asked for one at a time, so that a piece may be a copy of what only the optimizer can read.
    sizes: how many elements each parameter of the model has, over all ranks. Nothing is copied before the checkpoint
        was found to hold these parameters, whole, in every kind.

    Raises CheckpointError if a file is damaged, or if the checkpoint is incomplete or of another model.
    """
    stored = _index(folder)
    _check(folder, stored, sizes)
    for piece in pieces:
        for kind, target in piece.tensors.items():
            _copy(stored[piece.name, kind], piece.start, target)


def _index(folder: Path) -> dict[tuple[str, str], list[_Stored]]:
    found = defaultdict(list)
    for path in sorted(folder.glob("pieces-*.safetensors")):
        with _opened(path) as file:
            for key in file.keys():  # noqa: SIM118  (not a dict)
                name, start, kind = key.rsplit(":", 2)
                begin = int(start)
                found[name, kind].append(_Stored(begin, begin + file.get_slice(key).get_shape()[0], path, key))
    for each in found.values():
        each.sort(key=lambda one: one.start)
    return found


def _check(folder: Path, stored: dict, sizes: Mapping[str, int]) -> None:
    found = {name for name, _ in stored}
    missing, extra = sorted(set(sizes) - found), sorted(found - set(sizes))
    if missing or extra:
        listed = [f"lacks {', '.join(missing[:3])}"] if missing else []
        listed += [f"has {', '.join(extra[:3])}, which the model has not"] if extra else []
        raise CheckpointError(
            f"{folder} {' and '.join(listed)}: a file is missing, or the checkpoint is of another model"
        )
    for name, size in sizes.items():
        for kind in (WEIGHT, *MOMENTS):
            covered = 0
            for each in stored.get((name, kind), ()):
                if each.start > covered:
                    break
                covered = max(covered, each.end)
            if covered != size:
                raise CheckpointError(
                    f"{folder} has {covered} elements of {name} ({kind}), the model has {size}: a file is missing, or "
                    "the checkpoint is of another model"
                )


def _copy(stored: list[_Stored], start: int, target: torch.Tensor) -> None:
    end = start + target.numel()
    with torch.no_grad():
        for each in stored:
            low, high = max(start, each.start), min(end, each.end)
            if low < high:
                try:
                    with _opened(each.path) as file:
                        part = file.get_slice(each.key)[low - each.start : high - each.start]
                except (SafetensorError, RuntimeError, OSError) as error:
                    raise CheckpointError(f"{each.path} is damaged: {error}") from None
                target[low - start : high - start].copy_(part)


def _opened(path: Path):
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged or truncated: {error}") from None
