"""Tables that describe tensors in host memory to the compiled loops.

A *block* is a rectangle of numbers: some rows of equal length at a fixed distance. A *row* is what
gets one number: a tensor, a part of a large tensor, or a unit.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from distclip.common import exponents

Integers: TypeAlias = npt.NDArray[np.int64]

PART = 1 << 20
"""Elements of a block at most, so that several threads can share the work on one tensor."""


class Kind(enum.IntEnum):
    """Number formats that the compiled loops read."""

    FLOAT32 = 0
    BFLOAT16 = 1
    FLOAT16 = 2
    FLOAT64 = 3


KIND_OF = {
    torch.float32: Kind.FLOAT32,
    torch.bfloat16: Kind.BFLOAT16,
    torch.float16: Kind.FLOAT16,
    torch.float64: Kind.FLOAT64,
}

STRIDED = 1
"""Flag of a block's variant; the kind is in the bits above."""


class Column(enum.IntEnum):
    """What the table holds of a block; every column is int64.

    ``VARIANT``: ``2 * kind``, plus the flag. ``STEP`` and ``ROW_STEP``: bytes from an element, or a
    row, to the next. ``INDEX``: the place of the first row's number.
    """

    ADDRESS = 0
    VARIANT = 1
    ROWS = 2
    ROW_STEP = 3
    LENGTH = 4
    STEP = 5
    INDEX = 6


BLOCK_COLUMNS = len(Column)

COUNTED, CLAMPED = "_counted", "_clamped"
"""End the names of loops that also count exponents, or measure as if clamped, too."""
RECORD = exponents.COLUMNS + 3
"""Float64 numbers of a block's counts of exponents: the columns, and room to write in."""


@dataclass(frozen=True, eq=False)
class Blocks:
    """The table of the blocks of some tensors, without addresses, which change every step.

    Attributes:
        blocks: ``(blocks, COLUMNS)``.
        owner: the tensor that each block belongs to.
        offset: bytes from the tensor's first element to the block's.
        firsts: the first row of each tensor.
        counts: rows of each tensor.
        rows: how many rows there are.
        elements: how many elements there are.
        simple: whether every tensor is one row.
        has_float64: whether any number is a float64 number.
    """

    blocks: Integers
    owner: Integers
    offset: Integers
    firsts: Integers
    counts: Integers
    rows: int
    elements: int
    simple: bool
    has_float64: bool
    _shares: dict[int, list[int]] = field(default_factory=dict)
    _parts: dict[tuple[int, int], Blocks] = field(default_factory=dict)
    _placed: list[Integers] = field(default_factory=list)

    def place(self, addresses: Integers) -> None:
        """Enter the addresses that the tensors have now; an array that is never changed."""
        if self._placed and self._placed[0] is addresses:
            return
        if self.simple:
            self.blocks[:, Column.ADDRESS] = addresses
        else:
            self.blocks[:, Column.ADDRESS] = addresses[self.owner] + self.offset
        self._placed[:] = [addresses]

    @cached_property
    def address(self) -> int:
        """The address of the blocks."""
        return int(self.blocks.ctypes.data)

    def within(self, firsts: Integers, rows: int) -> Blocks:
        """This table with each tensor's rows numbered from ``firsts`` on, among ``rows``."""
        if np.array_equal(firsts, self.firsts) and rows == self.rows:
            return self
        blocks = self.blocks.copy()
        blocks[:, Column.INDEX] += (firsts - self.firsts)[self.owner]
        made = replace(self, blocks=blocks, firsts=firsts, rows=rows)
        return replace(made, _shares={}, _parts={}, _placed=[])

    def part(self, numbers: slice) -> Blocks:
        """The table of some of the tensors, one after another, whose rows are numbered from 0."""
        key = first, stop = numbers.start, numbers.stop
        known = self._parts.get(key)
        if known is None:
            begin, end = np.searchsorted(self.owner, key)
            blocks, firsts = self.blocks[begin:end].copy(), self.firsts[first:stop]
            blocks[:, Column.INDEX] -= firsts[0]
            counts = self.counts[first:stop]
            known = self._parts[key] = Blocks(
                blocks,
                self.owner[begin:end] - first,
                self.offset[begin:end],
                firsts - firsts[0],
                counts,
                int(counts.sum()),
                int((blocks[:, Column.ROWS] * blocks[:, Column.LENGTH]).sum()),
                simple=self.simple,
                has_float64=self.has_float64,
            )
        return known

    def shares(self, threads: int) -> list[int]:
        """Bounds of ``threads`` runs of blocks with about equally many elements."""
        known = self._shares.get(threads)
        if known is None:
            work = np.cumsum(self.blocks[:, Column.ROWS] * self.blocks[:, Column.LENGTH])
            goals = work[-1] * np.arange(1, threads) / threads
            cuts = np.searchsorted(work, goals).tolist()
            known = self._shares[threads] = [0, *cuts, len(work)]
        return known


@dataclass(frozen=True)
class Shape:
    """How the elements of a tensor lie, as rows of equal length; distances in elements."""

    rows: int
    row_step: int
    length: int
    step: int


def collapsed(sizes: Sequence[int], strides: Sequence[int]) -> list[tuple[int, int]]:
    """The dims of a strided tensor as ``(size, stride)``, with those that run on merged."""
    found: list[tuple[int, int]] = []
    for size, stride in zip(sizes, strides, strict=True):
        if size == 1:
            continue
        if found and found[-1][1] == size * stride:
            found[-1] = (found[-1][0] * size, stride)
        else:
            found.append((size, stride))
    return found


def shape_of(tensor: Tensor) -> Shape | None:
    """All elements of a tensor, in any order; None where rows of equal distance do not reach."""
    order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    dims = collapsed([tensor.shape[d] for d in order], [tensor.stride(d) for d in order])
    return _rectangle([(1, 0), *dims][-2:]) if len(dims) <= 2 else None


def shape_of_units(tensor: Tensor, unit_dims: Sequence[int]) -> Shape | None:
    """The units of a tensor, each as one row, in row-major order of ``unit_dims``."""
    others = [dim for dim in range(tensor.dim()) if dim not in unit_dims]
    others.sort(key=tensor.stride, reverse=True)  # within a unit any order does

    def dims(chosen: Sequence[int]) -> list[tuple[int, int]]:
        merged = collapsed([tensor.shape[d] for d in chosen], [tensor.stride(d) for d in chosen])
        return merged or [(1, 1)]

    units, within = dims(unit_dims), dims(others)
    return _rectangle([*units, *within]) if len(units) == len(within) == 1 else None


def _rectangle(dims: Sequence[tuple[int, int]]) -> Shape:
    (rows, row_step), (length, step) = [(1, 0)] * (2 - len(dims)) + list(dims)
    return Shape(rows, row_step, length, step)


def table_of(
    kinds: Sequence[Kind],
    shapes: Sequence[Shape],
    *,
    units: bool = False,
) -> Blocks:
    """The table of tensors of these kinds and shapes.

    Args:
        kinds: of each tensor.
        shapes: of each tensor.
        units: rows are units, which are never divided.
    """
    kind = np.array(kinds, np.int64)
    described = np.array([(s.rows, s.row_step, s.length, s.step) for s in shapes], np.int64)
    rows, row_step, length, step = described.reshape(-1, 4).T
    return _divided(kind, rows, row_step, length, step, units=units)


def table_of_contiguous(
    kinds: Sequence[Kind],
    numels: Sequence[int] | Integers,
    counts: Sequence[int] | None = None,
) -> Blocks:
    """The table of contiguous tensors.

    Args:
        kinds: of each tensor.
        numels: elements of each.
        counts: rows of each, for its units; None: each is one row.
    """
    kind, numel = np.array(kinds, np.int64), np.array(numels, np.int64)
    rows = np.ones_like(numel) if counts is None else np.array(counts, np.int64)
    length = numel // np.maximum(rows, 1)
    return _divided(kind, rows, length, length, np.ones_like(numel), units=counts is not None)


def table_of_segments(lengths: Sequence[int]) -> Blocks:
    """The table of consecutive runs of one contiguous float64 tensor."""
    table = table_of_contiguous([Kind.FLOAT64] * len(lengths), lengths)
    starts = np.cumsum([0, *lengths])[:-1] * SIZES[Kind.FLOAT64]
    return replace(
        table,
        owner=np.zeros_like(table.owner),
        offset=starts[table.owner] + table.offset,
        simple=False,
        _placed=[],
    )


SIZES = np.array([4, 2, 2, 8])
"""Bytes of a number, by kind."""


def _divided(
    kind: Integers,
    rows: Integers,
    row_step: Integers,
    length: Integers,
    step: Integers,
    *,
    units: bool,
) -> Blocks:
    """Cut what is large into parts; arguments by tensor, distances in elements."""
    elements = rows * length
    by_length = (rows == 1) & (length > PART) & (not units)
    by_rows = (rows > 1) & (elements > PART)
    at_once = np.maximum(PART // np.maximum(length, 1), 1)
    parts = np.where(by_length, -(-length // PART), np.where(by_rows, -(-rows // at_once), 1))
    row_counts = np.where(by_length, parts, rows)
    firsts = np.cumsum(row_counts) - row_counts
    size = SIZES[kind] if len(kind) else kind
    owner = np.repeat(np.arange(len(kind)), parts)
    part = np.arange(len(owner)) - np.repeat(np.cumsum(parts) - parts, parts)

    def each(values: npt.NDArray[Any]) -> Any:
        return values[owner]

    done = part * np.where(each(by_rows), each(at_once), 1)  # rows before this part
    blocks = np.zeros((len(owner), BLOCK_COLUMNS), np.int64)
    blocks[:, Column.VARIANT] = each(2 * kind + np.where(step == 1, 0, STRIDED))
    whole_rows = np.where(each(by_rows), np.minimum(each(at_once), each(rows) - done), each(rows))
    blocks[:, Column.ROWS] = whole_rows
    blocks[:, Column.ROW_STEP] = each(row_step * size)
    rest = np.minimum(each(length) - part * PART, PART)
    blocks[:, Column.LENGTH] = np.where(each(by_length), rest, each(length))
    blocks[:, Column.STEP] = each(step * size)
    blocks[:, Column.INDEX] = each(firsts) + done
    by_part = np.where(
        each(by_length), part * PART * each(step * size), done * each(row_step * size)
    )
    return Blocks(
        blocks,
        owner,
        by_part,
        firsts,
        row_counts,
        int(row_counts.sum()),
        int(elements.sum()),
        simple=bool((parts == 1).all() and (rows == 1).all()),
        has_float64=bool((kind == Kind.FLOAT64).any()),
    )
