"""Slices of unequal size: a rank knows only its own, so the sizes of all are exchanged.

A plain tensor that is declared a slice knows its own size, and a ``DTensor`` that is not cut as
``torch.chunk`` cuts (rows of an embedding, assigned to ranks by hand) the whole size too. What the
entries of all ranks say makes the logical shape and the place of each slice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from distclip.errors import RankMismatchError
from distclip.layouts.piece import Box, Described, Entry, Piece

Entries = Sequence[Entry]


def settle(
    described: Sequence[Described], tables: Sequence[Entries], ranks: Sequence[int], me: int
) -> tuple[list[Described], list[Entries]]:
    """Descriptions with the logical shapes and offsets that the slices of all ranks make together.

    Args:
        described: of this rank.
        tables: of every rank; ranks that have the same share one object.
        ranks: global rank of each.
        me: global rank of this one.

    Raises:
        RankMismatchError: slices that do not make up the tensor, on every rank.
    """
    views = {id(table): table for table in tables}
    if not any(entry.slice for table in views.values() for entry in table):
        return list(described), list(tables)
    by_name = {key: {entry.name: entry for entry in table} for key, table in views.items()}
    at = {rank: by_name[id(table)] for rank, table in zip(ranks, tables, strict=True)}
    known: dict[tuple[str, tuple[int, ...] | None], list[int] | None] = {}

    def extents(entry: Entry) -> list[int] | None:
        key = entry.name, entry.ranks
        if key not in known:
            known[key] = _extents(entry, at)
        return known[key]

    def settled(entry: Entry) -> Entry:
        found = extents(entry)
        if found is None:
            return entry
        dim = entry.split_dims[0]
        shape = (*entry.shape[:dim], sum(found), *entry.shape[dim + 1 :])
        return replace(entry, shape=shape, slice=None)

    new = {key: [settled(entry) for entry in table] for key, table in views.items()}
    mine: list[Described] = []
    for entry, pieces in described:
        found = extents(entry)
        if found is not None and entry.ranks is not None:
            before = sum(found[: entry.ranks.index(me)])
            pieces = [_moved(piece, entry.split_dims[0], before) for piece in pieces]
        mine.append((settled(entry), pieces))
    return mine, [new[id(table)] for table in tables]


def _extents(entry: Entry, at: dict[int, dict[str, Entry]]) -> list[int] | None:
    """Extent of each slice of a tensor along the dim that is cut; None where it is not such a one.

    Raises:
        RankMismatchError: they do not make up the tensor.
    """
    if entry.ranks is None or len(entry.split_dims) != 1:
        return None
    holders = [at.get(rank, {}).get(entry.name) for rank in entry.ranks]
    found = [each for each in holders if each is not None]
    if len(found) < len(holders) or not any(each.slice for each in found):
        return None
    dim, parts = entry.split_dims[0], len(found)
    if any(each.split_dims != entry.split_dims for each in found):
        return None  # different dims: refused where tables are compared
    extents = [
        each.slice.extent if each.slice else chunk(each.shape[dim], parts, place)
        for place, each in enumerate(found)
    ]
    wanted = {each.shape[dim] for each in found if each.slice is None or each.slice.whole}
    if wanted and wanted != {sum(extents)}:
        raise RankMismatchError(
            f"parameter {entry.name!r} has an extent of {max(wanted)} along dim {dim}, but the "
            f"slices on its ranks, of {', '.join(map(str, extents))}, make up {sum(extents)}; "
            f"build the DTensor of slices that cover it"
        )
    return extents


def chunk(extent: int, parts: int, place: int) -> int:
    """How much of ``extent`` ``torch.chunk`` gives to one of ``parts``."""
    size = -(-extent // parts)
    return max(0, min(extent - place * size, size))


def _moved(piece: Piece, dim: int, offset: int) -> Piece:
    offsets = (*piece.box.offsets[:dim], offset, *piece.box.offsets[dim + 1 :])
    return replace(piece, box=Box(offsets, piece.box.extents))
