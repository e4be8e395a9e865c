"""Where many tensors lie, as a kernel can read it: one short int64 vector on their device.

A training step finds its gradients where the last one left them, mostly: tables are remembered, and
found again by addresses, sizes and dtypes.
"""

from __future__ import annotations

import collections
import itertools
import operator
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from distclip.kernels.transfer import is_capturing, to_device

BLOCK = 2048
"""Elements that one program handles at a time, of a tensor or of a tile of rows."""
TURNS = 16
"""Times it does so. Also the length of a float32 sum."""
WIDEST_ROW = 1 << 16
"""Longer rows are measured as tensors of their own, by many programs each."""
REMEMBERED = 32

Numbers: TypeAlias = npt.NDArray[np.int64]
Table = TypeVar("Table", bound="Flat | Rows")


class KernelLaunch(NamedTuple):
    """One kernel launch: tensors of one dtype, and for rows of one class of widths.

    ``offset`` and ``programs``: which of the table's chunks or tiles. ``columns`` and ``vector``:
    of a tile, its width, and how many elements are aligned to 16 bytes throughout (else 1).
    """

    dtype: torch.dtype
    offset: int
    programs: int
    columns: int = 0
    vector: int = 1


class Flat(NamedTuple):
    """Tensors as chunks of ``BLOCK * TURNS`` elements. The names are those of the kernels."""

    pointers: Tensor
    numels: Tensor
    firsts: Tensor
    outputs: Tensor
    owners: Tensor
    launches: tuple[KernelLaunch, ...]
    segments: int
    chunks: int


class Rows(NamedTuple):
    """Matrices as tiles of ``BLOCK`` elements. The names are those of the kernels."""

    pointers: Tensor
    heights: Tensor
    widths: Tensor
    firsts: Tensor
    outputs: Tensor
    owners: Tensor
    launches: tuple[KernelLaunch, ...]
    rows: int


TILES = (16, 128, 1024)
"""Columns of a tile: the first that holds a row, or else the last."""

_dtype, _shape = map(operator.attrgetter, ("dtype", "shape"))

_known: collections.OrderedDict[Hashable, Flat | Rows] = collections.OrderedDict()
_captured: list[Flat | Rows] = []
"""Tables that a CUDA graph reads again at every replay."""


def flat(tensors: Sequence[Tensor]) -> Flat:
    """The table of dense tensors of one device, each with at least one element."""
    return _remembered("flat", tensors, (), _flat)


def row_table(matrices: Sequence[Tensor]) -> Rows:
    """The table of contiguous matrices of one device, each with at least one element."""
    heights = tuple([matrix.size(0) for matrix in matrices])
    return _remembered("rows", matrices, heights, _rows)


def _remembered(
    kind: str,
    tensors: Sequence[Tensor],
    more: Hashable,
    make: Callable[[Sequence[Tensor]], Table],
) -> Table:
    device = tensors[0].device
    if is_capturing(device):  # filled at every replay: of no use to others, nor theirs to it
        table = make(tensors)
        _captured.append(table)
        return table
    # On the stream that filled it no one has to wait for it.
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    key = (
        kind,
        device,
        stream,
        tuple(map(Tensor.data_ptr, tensors)),
        tuple(map(Tensor.numel, tensors)),
        tuple(map(_dtype, tensors)),
        more,
    )
    found = _known.get(key)
    if found is None:
        found = _known[key] = make(tensors)
        if len(_known) > REMEMBERED:
            _known.popitem(last=False)
    else:
        _known.move_to_end(key)
    return found  # type: ignore[return-value]  # the kind is in the key


def _flat(tensors: Sequence[Tensor]) -> Flat:
    dtypes = list(map(_dtype, tensors))
    order = _sorted(dtypes, str)
    ordered = tensors if order == range(len(tensors)) else [tensors[each] for each in order]
    dtypes = [dtypes[each] for each in order]
    pointers, numels = (
        np.array(list(map(read, ordered)), dtype=np.int64)
        for read in (Tensor.data_ptr, Tensor.numel)
    )
    heads = pointers % 16 // np.array([dtype.itemsize for dtype in dtypes])
    counts = -(-(heads + numels) // (BLOCK * TURNS))
    views, total = _packed(ordered[0].device, pointers, counts, [numels], order)
    launches = _launches([(dtype,) for dtype in dtypes], counts)
    where, numbers, firsts, outputs, owners = views
    return Flat(where, numbers, firsts, outputs, owners, launches, len(tensors), total)


def _rows(matrices: Sequence[Tensor]) -> Rows:
    pointers = np.fromiter(map(Tensor.data_ptr, matrices), np.int64, len(matrices))
    shapes = np.array(list(map(_shape, matrices)), dtype=np.int64)
    dtypes = list(map(_dtype, matrices))
    known = sorted(set(dtypes), key=str)
    place = dict(zip(known, range(len(known)), strict=True))
    numbers = np.fromiter(map(place.__getitem__, dtypes), np.int64, len(dtypes))
    starts = np.cumsum(shapes[:, 0]) - shapes[:, 0]
    rows = int(shapes[:, 0].sum())
    # Of a kind are those of one dtype, with tiles of one width, that are aligned alike.
    size = np.array([dtype.itemsize for dtype in known])[numbers]
    columns = np.array(TILES)[np.searchsorted(TILES[:-1], shapes[:, 1])]
    aligned = (pointers % 16 == 0) & (shapes[:, 1] * size % 16 == 0)
    kinds = np.stack([numbers, columns, np.where(aligned, 16 // size, 1)], axis=1)
    order = np.lexsort(kinds.T[::-1])
    pointers, shapes, kinds, starts = pointers[order], shapes[order], kinds[order], starts[order]
    counts = -(-shapes[:, 0] // np.maximum(1, BLOCK // kinds[:, 1]))
    views, _ = _packed(matrices[0].device, pointers, counts, [*shapes.T], starts)
    where, tall, wide, firsts, outputs, owners = views
    of_kinds = [(known[number], *tile) for number, *tile in kinds.tolist()]
    return Rows(where, tall, wide, firsts, outputs, owners, _launches(of_kinds, counts), rows)


Kind = TypeVar("Kind", bound=Hashable)


def _sorted(kinds: Sequence[Kind], key: Callable[[Kind], Any]) -> Sequence[int]:
    """Positions, those of one kind beside each other."""
    if len(set(kinds)) == 1:
        return range(len(kinds))
    keys = {kind: key(kind) for kind in set(kinds)}
    return sorted(range(len(kinds)), key=lambda each: keys[kinds[each]])


def _packed(
    device: torch.device,
    pointers: Numbers,
    counts: Numbers,
    sizes: Sequence[Numbers],
    outputs: Sequence[int] | Numbers,
) -> tuple[list[Tensor], int]:
    """Addresses, sizes, first programs, outputs and owners in one transfer, as views of it."""
    firsts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    owners = np.repeat(np.arange(len(pointers), dtype=np.int64), counts)
    parts = [pointers, *sizes, firsts, np.asarray(outputs, dtype=np.int64), owners]
    # Each at a multiple of 16 bytes: Triton compiles another kernel for every other alignment.
    stops = list(itertools.accumulate(len(part) + len(part) % 2 for part in parts))
    numbers = np.zeros(stops[-1], dtype=np.int64)
    for part, stop in zip(parts, stops, strict=True):
        start = stop - len(part) - len(part) % 2
        numbers[start : start + len(part)] = part
    placed = to_device(numbers, device)
    starts = [0, *stops[:-1]]
    return [
        placed[start : start + len(part)] for start, part in zip(starts, parts, strict=True)
    ], int(firsts[-1])


def _launches(kinds: Sequence[tuple[Any, ...]], counts: Numbers) -> tuple[KernelLaunch, ...]:
    """One for all neighbours of a kind: a dtype, and of rows columns and vector."""
    if len(set(kinds)) == 1:
        return (KernelLaunch(kinds[0][0], 0, int(counts.sum()), *kinds[0][1:]),)
    launches: list[KernelLaunch] = []
    offset = 0
    pairs = zip(kinds, counts.tolist(), strict=True)
    for kind, members in itertools.groupby(pairs, lambda each: each[0]):
        programs = sum(count for _, count in members)
        launches.append(KernelLaunch(kind[0], offset, programs, *kind[1:]))
        offset += programs
    return tuple(launches)
