"""What a cache of keys and values looks like: shapes, checks and capacity, shared by the ops that write and read it.

Contiguous: [B_cache, S_cache, Hkv, D]; row b, or cache_batch_idx[b], belongs to sequence b. Paged: [n_pages, page, Hkv,
D] with block_table [B, max_pages]: position p of sequence b is row p % page of page block_table[b, p // page].
"""

from __future__ import annotations

import torch

from tilestack.kernels import checks


def capacity(cache: torch.Tensor, block_table: torch.Tensor | None) -> int:
    """How many positions a sequence has room for."""
    return cache.shape[1] * (1 if block_table is None else block_table.shape[1])


def check_cache(op: str, k_cache: torch.Tensor, v_cache: torch.Tensor) -> None:
    """k_cache and v_cache are two caches of one shape."""
    checks.rank(op, "k_cache", k_cache, (4,), "[B_cache, S_cache, Hkv, D], or paged [n_pages, page, Hkv, D]")
    checks.floating(op, k_cache=k_cache)
    checks.at_least(op, "Hkv, the heads of k_cache,", k_cache.shape[2], 1)
    checks.at_least(op, "D, the head dimension of k_cache,", k_cache.shape[3], 1)
    checks.shape(op, "v_cache", v_cache, tuple(k_cache.shape), "the shape of k_cache")
    checks.same_dtype(op, k_cache=k_cache, v_cache=v_cache)


def check_places(
    op: str,
    k_cache: torch.Tensor,
    batch: int,
    block_table: torch.Tensor | None,
    cache_batch_idx: torch.Tensor | None,
    per_sequence: dict[str, torch.Tensor | None],
) -> None:
    """Where each of the `batch` sequences has its keys: int32 on the device of the cache, one entry each.

    per_sequence: further tensors of one int32 for each sequence.
    """
    vectors = {"cache_batch_idx": cache_batch_idx, **per_sequence}
    for name, tensor in vectors.items():
        if tensor is not None:
            checks.dtype(op, name, tensor, torch.int32)
            checks.shape(op, name, tensor, (batch,), "[B], one for each sequence")
    checks.same_device(op, k_cache=k_cache, block_table=block_table, **vectors)
    if block_table is not None:
        checks.dtype(op, "block_table", block_table, torch.int32)
        checks.rank(op, "block_table", block_table, (2,), "[B, max_pages]")
        checks.shape(op, "block_table", block_table, (batch, block_table.shape[1]), "[B, max_pages]")
        checks.at_least(op, "the page size, k_cache.shape[1],", k_cache.shape[1], 1)
        if cache_batch_idx is not None:
            raise ValueError(f"{op}: cache_batch_idx must be None with block_table, which says where a sequence is")
    elif cache_batch_idx is None:
        checks.shape(
            op, "k_cache", k_cache, (batch, *k_cache.shape[1:]), "one row for each sequence; else give cache_batch_idx"
        )


def check_rotary(
    op: str,
    rows: torch.Tensor,
    positions: int,
    rotary_cos: torch.Tensor | None,
    rotary_sin: torch.Tensor | None,
) -> None:
    """cos and sin [S_ro, R / 2] cover `positions` positions and at most the head dimension of `rows`."""
    if (rotary_cos is None) != (rotary_sin is None):
        given, missing = ("cos", "sin") if rotary_sin is None else ("sin", "cos")
        raise ValueError(f"{op}: rotary_{missing} is missing: rotary_{given} is given, give both or none")
    if rotary_cos is None:
        return
    checks.rank(op, "rotary_cos", rotary_cos, (2,), "[S_ro, R / 2]")
    checks.shape(op, "rotary_sin", rotary_sin, tuple(rotary_cos.shape), "the shape of rotary_cos")
    checks.same_device(op, k_cache=rows, rotary_cos=rotary_cos, rotary_sin=rotary_sin)
    checks.same_dtype(op, rotary_cos=rotary_cos, rotary_sin=rotary_sin)
    if rotary_cos.dtype not in (torch.float32, rows.dtype):
        raise ValueError(f"{op}: rotary_cos must be torch.float32 or {rows.dtype}, got {rotary_cos.dtype}")
    if not 0 < 2 * rotary_cos.shape[1] <= rows.shape[-1]:
        raise ValueError(
            f"{op}: rotary_cos must have 1 to D / 2 = {rows.shape[-1] // 2} columns, got {rotary_cos.shape[1]}"
        )
    checks.at_least(op, "S_ro, the rows of rotary_cos, which must cover the cache,", rotary_cos.shape[0], positions)


def sequence_positions(
    cache: torch.Tensor,
    sequence: int,
    begin: int,
    end: int,
    block_table: torch.Tensor | None,
    cache_batch_idx: torch.Tensor | None,
) -> tuple[torch.Tensor | int, torch.Tensor | slice]:
    """The two leading indices of the cache that hold positions `begin` to `end` of a sequence.

    For plain torch: cache_batch_idx is read on the host.
    """
    if block_table is None:
        row = sequence if cache_batch_idx is None else int(cache_batch_idx[sequence])
        return row, slice(begin, end)
    places = torch.arange(begin, end, device=cache.device)
    page = cache.shape[1]
    return block_table[sequence].long()[places // page], places % page


def rotated(
    x: torch.Tensor, positions: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool
) -> torch.Tensor:
    """x [S, H, D] with its first R columns rotated to `positions` [S], in float32, rounded to x's dtype.

    Pairs are columns 2i and 2i + 1 if interleaved, else i and i + R / 2. Positions past the table take its last row.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    positions = positions.clamp(0, cos.shape[0] - 1)
    cos, sin = (table[positions].to(wide)[:, None] for table in (cos, sin))
    half = cos.shape[-1]
    turning, rest = x[..., : 2 * half], x[..., 2 * half :]
    pairs = turning.unflatten(-1, (half, 2)) if interleaved else turning.unflatten(-1, (2, half)).mT
    first, second = pairs.to(wide).unbind(-1)
    turned = torch.stack((first * cos - second * sin, first * sin + second * cos), -1)
    turned = turned.flatten(-2) if interleaved else turned.mT.flatten(-2)
    return torch.cat((turned.to(x.dtype), rest), -1)
