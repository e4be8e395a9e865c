"""Where many tensors lie, as a kernel can read it: one short int64 vector on their device.

A training step finds its gradients where the last one left them, mostly: tables are remembered, and
found again by addresses, sizes and dtypes.
"""

from __future__ import annotations

import collections
import itertools
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple, TypeVar

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

Table = TypeVar("Table", bound="Flat | Rows")


class Launch(NamedTuple):
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
    launches: tuple[Launch, ...]
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
    launches: tuple[Launch, ...]
    rows: int


_known: collections.OrderedDict[Hashable, Flat | Rows] = collections.OrderedDict()
_captured: list[Flat | Rows] = []
"""Those that a CUDA graph reads again at every replay."""


def flat(tensors: Sequence[Tensor]) -> Flat:
    """The table of dense tensors of one device, each with at least one element."""
    return _remembered("flat", tensors, (), _flat)


def rows(matrices: Sequence[Tensor]) -> Rows:
    """The table of contiguous matrices of one device, each with at least one element."""
    heights = tuple([len(matrix) for matrix in matrices])
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
        tuple([tensor.data_ptr() for tensor in tensors]),
        tuple([tensor.numel() for tensor in tensors]),
        tuple([tensor.dtype for tensor in tensors]),
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
    order = sorted(range(len(tensors)), key=lambda each: str(tensors[each].dtype))
    ordered = [tensors[each] for each in order]
    heads = [tensor.data_ptr() % 16 // tensor.element_size() for tensor in ordered]
    chunk = BLOCK * TURNS
    counts = [-(-(head + t.numel()) // chunk) for head, t in zip(heads, ordered, strict=True)]
    (pointers, numels, firsts, outputs, owners), total = _packed(
        ordered[0].device, ordered, counts, [[tensor.numel() for tensor in ordered]], order
    )
    return Flat(
        pointers,
        numels,
        firsts,
        outputs,
        owners,
        launches=_launches([(t.dtype,) for t in ordered], counts),
        segments=len(tensors),
        chunks=total,
    )


def _rows(matrices: Sequence[Tensor]) -> Rows:
    starts = np.cumsum([0, *(len(matrix) for matrix in matrices)])
    kinds = [_kind(matrix) for matrix in matrices]
    order = sorted(range(len(matrices)), key=lambda each: (str(kinds[each][0]), *kinds[each][1:]))
    ordered = [matrices[each] for each in order]
    counts = [-(-len(matrices[each]) // max(1, BLOCK // kinds[each][1])) for each in order]
    sizes = [[len(matrix) for matrix in ordered], [matrix.shape[1] for matrix in ordered]]
    (pointers, heights, widths, firsts, outputs, owners), _ = _packed(
        ordered[0].device, ordered, counts, sizes, starts[order]
    )
    return Rows(
        pointers,
        heights,
        widths,
        firsts,
        outputs,
        owners,
        launches=_launches([kinds[each] for each in order], counts),
        rows=int(starts[-1]),
    )


def _kind(matrix: Tensor) -> tuple[torch.dtype, int, int]:
    """Dtype, columns of a tile, elements in 16 bytes if all its rows are aligned to them."""
    width, size = matrix.shape[1], matrix.element_size()
    columns = next((each for each in (16, 128) if width <= each), 1024)
    aligned = matrix.data_ptr() % 16 == 0 and width * size % 16 == 0
    return matrix.dtype, columns, 16 // size if aligned else 1


def _packed(
    device: torch.device,
    tensors: Sequence[Tensor],
    counts: Sequence[int],
    sizes: Sequence[Sequence[int]],
    outputs: Sequence[int] | npt.NDArray[np.int64],
) -> tuple[list[Tensor], int]:
    """Addresses, sizes, first programs, outputs and owners in one transfer, as views of it."""
    firsts = np.concatenate([[0], np.cumsum(counts)])
    parts = [
        np.array([tensor.data_ptr() for tensor in tensors], dtype=np.int64),
        *(np.array(each, dtype=np.int64) for each in sizes),
        firsts.astype(np.int64),
        np.asarray(outputs, dtype=np.int64),
        np.repeat(np.arange(len(tensors), dtype=np.int64), counts),
    ]
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


def _launches(
    kinds: Sequence[tuple[torch.dtype] | tuple[torch.dtype, int, int]], counts: Sequence[int]
) -> tuple[Launch, ...]:
    """One for all neighbours of a kind."""
    launches: list[Launch] = []
    offset = 0
    for kind, members in itertools.groupby(zip(kinds, counts, strict=True), lambda each: each[0]):
        programs = sum(count for _, count in members)
        launches.append(Launch(kind[0], offset, programs, *kind[1:]))
        offset += programs
    return tuple(launches)
