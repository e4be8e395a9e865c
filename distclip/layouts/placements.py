"""Which elements of a tensor DTensor placements leave at one coordinate of a device mesh."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, TypeAlias, cast

from torch.distributed.tensor import (
    Placement,
    Replicate,
)

from distclip.layouts.piece import (
    Box,
)

Span: TypeAlias = tuple[int, int]
"""``start, stop`` along one dim of the logical tensor."""


def shard_dim(placement: Placement) -> int | None:
    """The tensor dim that a placement cuts, or None for a replica."""
    if isinstance(placement, Replicate):
        return None
    return cast(int, cast(Any, placement).dim)


def local_spans(
    shape: Sequence[int],
    mesh_shape: Sequence[int],
    coordinate: Sequence[int],
    placements: Sequence[Placement],
) -> list[list[Span]]:
    """Per tensor dim, the spans of the logical tensor that lie at ``coordinate``.

    Shardings apply from left to right, each to what the one before it left, as DTensor defines.
    """
    spans: list[list[Span]] = [[(0, extent)] for extent in shape]
    for size, position, placement in zip(mesh_shape, coordinate, placements, strict=True):
        dim = shard_dim(placement)
        if dim is None:
            continue
        factor = getattr(placement, "split_factor", None)
        if factor is None or not type(placement).__name__.startswith("_Strided"):
            spans[dim] = _chunk(spans[dim], size, position)
        else:  # FSDP2 over TP: each of the inner mesh's chunks was cut again
            inner = [_chunk(spans[dim], int(factor), i) for i in range(int(factor))]
            spans[dim] = _merge(
                itertools.chain.from_iterable(_chunk(part, size, position) for part in inner)
            )
    return spans


def _chunk(spans: Sequence[Span], chunks: int, position: int) -> list[Span]:
    """What ``torch.chunk`` gives at ``position``, of indices as spans; empty past the end."""
    total = sum(stop - start for start, stop in spans)
    size = -(-total // chunks)
    low, high = min(position * size, total), min((position + 1) * size, total)
    taken, seen = [], 0
    for start, stop in spans:
        first, last = max(low - seen, 0), min(high - seen, stop - start)
        if first < last:
            taken.append((start + first, start + last))
        seen += stop - start
    return taken


def _merge(spans: itertools.chain[Span]) -> list[Span]:
    merged: list[Span] = []
    for start, stop in spans:
        if merged and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], stop)
        else:
            merged.append((start, stop))
    return merged


def shard_boxes(spans: Sequence[Sequence[Span]]) -> list[tuple[Box, Box, bool]]:
    """Each local box as ``(in the logical tensor, in the local tensor, is it all of it)``.

    One box in every usual case; several where a strided sharding leaves gaps. An empty shard is an
    empty box: its rank takes part in whatever the others do (reducing a ``Partial`` gradient).
    """
    located: list[list[tuple[Span, int]]] = []
    for dim in spans:
        here, offset = [], 0
        for start, stop in dim or [(0, 0)]:
            here.append(((start, stop), offset))
            offset += stop - start
        located.append(here)
    combinations = list(itertools.product(*located))
    boxes = []
    for combination in combinations:
        extents = tuple(stop - start for (start, stop), _ in combination)
        boxes.append(
            (
                Box(tuple(start for (start, _), _ in combination), extents),
                Box(tuple(offset for _, offset in combination), extents),
                len(combinations) == 1,
            )
        )
    return boxes
