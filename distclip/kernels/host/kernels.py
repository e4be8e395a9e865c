"""Norms, multiplications and clamps of many host tensors, each in one call of a compiled loop."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypeVar, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from distclip.common import exponents
from distclip.kernels.host import compiler, threads
from distclip.kernels.host.blocks import (
    COUNTED,
    KINDS,
    RECORD,
    Integers,
    Kind,
    Shape,
    Table,
    shape_of,
    shape_of_units,
    table_of,
    table_of_contiguous,
    table_of_segments,
)
from distclip.kernels.look import PLAIN, Look, look, there

Floats: TypeAlias = npt.NDArray[np.float64]
Made = TypeVar("Made")
Each = TypeVar("Each")

_dtype, _shape, _is_cpu = map(operator.attrgetter, ("dtype", "shape", "is_cpu"))
LOOPS = {1.0: "magnitudes", 2.0: "squares", math.inf: "largest"}
"""Orders of norms, and the loops that measure them."""
LEAST, MOST = 1e-280, 1e300
"""Sums of squares of float64 numbers between these have lost nothing to underflow or overflow."""


@dataclass(frozen=True)
class Chosen:
    """Host tensors that the loops take, and their table.

    Attributes:
        tensors: the tensors.
        positions: which of the tensors asked for these are; None where they are all.
        table: with the tensors, or their units, as rows.
        addresses: of the tensors, int64.
        owners: the tensors that these are views of, where they are views; else these.
    """

    tensors: Sequence[Tensor]
    positions: Sequence[int] | None
    table: Table
    addresses: Integers
    owners: Sequence[Tensor]

    def part(self, numbers: slice) -> Chosen:
        """Some of the tensors, one after another; their rows are numbered from 0."""
        table, addresses = self.table.part(numbers), self.addresses[numbers]
        return Chosen(self.tensors[numbers], None, table, addresses, self.owners[numbers])


@dataclass
class Tables:
    """The tables of the tensors of one plan, kept from step to step while nothing changes."""

    _known: dict[str, tuple[object, Any]] = field(default_factory=dict)

    def remembered(self, what: str, key: object, make: Callable[[], Made]) -> Made:
        """What ``make`` made for this key the last time; ``what`` tells one set from another."""
        known = self._known.get(what)
        if known is None or known[0] != key:
            known = self._known[what] = key, make()
        return cast(Made, known[1])


def choose(
    tensors: Sequence[Tensor | None],
    what: str = "",
    *,
    unit_dims: Sequence[Sequence[int]] | None = None,
    counts: Sequence[int] | None = None,
    bounds: Sequence[float | None] | None = None,
    tables: Tables | None = None,
    seen: Look | None = None,
    pairs: bool = False,
) -> Chosen | None:
    """Select the tensors that the compiled loops take; None where there are none.

    Args:
        tensors: any; None stands for a tensor that is missing.
        what: these tensors are, among those of ``tables``.
        unit_dims: per tensor, the dims that index its units, which are then the rows.
        counts: per tensor, how many units it has; with ``unit_dims``. The table then describes the
            vector of the units of all the tensors, taken or not.
        bounds: per tensor, what its elements are clamped to when they are read.
        tables: remembered tables.
        seen: what a look at those that are there has found.
        pairs: whether complex numbers are two real ones each, as for 2-norms and multiplication.
    """
    kinds = compiler.kinds()
    if not kinds or not tensors:
        return None
    tables = Tables() if tables is None else tables
    seen = look(there(tensors)) if seen is None else seen
    if seen is not None and _takes(seen, kinds, unit_dims):
        return _chosen(tensors, what, counts, bounds, tables, seen)
    make = functools.partial(_select, tensors, kinds, unit_dims, counts, bounds, pairs)
    key = _layouts(tensors, unit_dims, counts, bounds, pairs)
    selected = make() if key is None else tables.remembered(f"{what} one by one", key, make)
    if selected is None:
        return None
    some = [cast(Tensor, tensors[number]) for number in selected.positions]
    for number in selected.complex:
        some[number] = torch.view_as_real(some[number])
    positions = selected.positions if len(some) < len(tensors) else None
    addresses = np.fromiter(map(Tensor.data_ptr, some), np.int64, len(some))
    return Chosen(some, positions, selected.table, addresses, some)


@dataclass(frozen=True)
class _Selected:
    """The tensors among some that the loops take, found one by one.

    Attributes:
        positions: which these are.
        complex: those that are read as pairs, counted among them.
        table: of all of them.
    """

    positions: Sequence[int]
    complex: Sequence[int]
    table: Table


def _layouts(tensors: Sequence[Tensor | None], *more: object) -> object | None:
    """All that :func:`_select` looks at, to compare with; None where some have no strides."""
    some = there(tensors)
    try:
        return (
            list(map(type, tensors)),
            list(map(_dtype, some)),
            list(map(_shape, some)),
            list(map(Tensor.stride, some)),
            list(map(_is_cpu, some)),
            list(map(Tensor.is_conj, some)),
            list(map(Tensor.is_neg, some)),
            more,
        )
    except RuntimeError:
        return None


def _select(
    tensors: Sequence[Tensor | None],
    kinds: frozenset[Kind],
    unit_dims: Sequence[Sequence[int]] | None,
    counts: Sequence[int] | None,
    bounds: Sequence[float | None] | None,
    pairs: bool,
) -> _Selected | None:
    found: list[tuple[int, Kind, Shape]] = []
    are_complex: list[int] = []
    for number, given in enumerate(tensors):
        is_pairs = pairs and given is not None and is_of_pairs(given)
        tensor = torch.view_as_real(given) if is_pairs and given is not None else given
        if tensor is None or not is_readable(tensor, kinds) or not tensor.numel():
            continue
        dims = None if unit_dims is None else unit_dims[number]
        shape = shape_of(tensor) if dims is None else shape_of_units(tensor, dims)
        if shape is not None:
            if is_pairs:
                are_complex.append(len(found))
            found.append((number, KINDS[tensor.dtype], shape))
    if not found:
        return None
    where, of_kinds, shapes = zip(*found, strict=True)
    limits = None if bounds is None else [bounds[number] for number in where]
    table = table_of(of_kinds, shapes, limits, units=unit_dims is not None)
    if counts is not None:
        table = table.within(_starts(counts, where), sum(counts))
    return _Selected(where, are_complex, table)


def _chosen(
    tensors: Sequence[Tensor | None],
    what: str,
    counts: Sequence[int] | None,
    bounds: Sequence[float | None] | None,
    tables: Tables,
    seen: Look,
) -> Chosen:
    """All of the tensors that are there; none has gaps."""
    positions: Sequence[int] | None = None
    if len(seen.tensors) < len(tensors):
        positions = [number for number, each in enumerate(tensors) if each is not None]

    def make() -> Table:
        kinds = [KINDS[dtype] for dtype in seen.dtypes]
        limits = None if bounds is None else _at(bounds, positions)
        if counts is None:
            return table_of_contiguous(kinds, seen.numels, None, limits)
        table = table_of_contiguous(kinds, seen.numels, _at(counts, positions), limits)
        return table.within(_starts(counts, positions), sum(counts))

    key = seen.kinds, counts, bounds, positions
    table = tables.remembered(what, key, make)
    return Chosen(seen.tensors, positions, table, seen.addresses, seen.owners)


def _takes(seen: Look, kinds: frozenset[Kind], unit_dims: Sequence[Sequence[int]] | None) -> bool:
    """Whether the loops take all of them, their units as rows one after another in memory."""
    return (
        seen.on_host
        and all(KINDS.get(each) in kinds for each in seen.kinds.distinct)
        and (unit_dims is None or (seen.row_major and _are_first(unit_dims)))
    )


def _at(values: Sequence[Each], positions: Sequence[int] | None) -> Sequence[Each]:
    return values if positions is None else [values[position] for position in positions]


def _starts(counts: Sequence[int], positions: Sequence[int] | None) -> Integers:
    """Where the units of each tensor begin, in the vector of the units of all."""
    starts = np.cumsum([0, *counts])[:-1]
    return starts if positions is None else starts[list(positions)]


def is_of_pairs(tensor: Tensor) -> bool:
    """Whether a tensor is of complex numbers that lie in memory as they are."""
    return (
        type(tensor) in PLAIN
        and tensor.is_complex()
        and tensor.layout is torch.strided
        and not (tensor.is_conj() or tensor.is_neg())
    )


def is_readable(tensor: Tensor, kinds: frozenset[Kind]) -> bool:
    """Whether a tensor's elements lie in host memory, in a format that the loops read."""
    return (
        type(tensor) in PLAIN
        and tensor.is_cpu
        and tensor.layout is torch.strided
        and KINDS.get(tensor.dtype) in kinds
    )


def _are_first(unit_dims: Sequence[Sequence[int]] | None) -> bool:
    """Whether units are indexed by the first dims everywhere, so that they are rows in memory."""
    return unit_dims is None or all(
        dims == tuple(range(len(dims))) for dims in set(map(tuple, unit_dims))
    )


def measures(norm_type: float) -> bool:
    """Whether there is a loop for norms of this order."""
    return norm_type in LOOPS


def norms(
    chosen: Chosen, norm_type: float, records: Floats | None = None
) -> tuple[Floats, list[int]]:
    """The p-norm of each of the tensors, p = 1, 2 or inf.

    Args:
        chosen: the tensors; without bounds where there are ``records``.
        norm_type: p.
        records: as of :func:`records_for`, where exponents are counted in the same reading.

    Returns:
        Float64 ``(len(chosen.tensors),)``; and which of them, counted from 0, are float64 tensors
        whose squares have left the range of float64.
    """
    measured = functools.partial(_wholes, chosen.table, chosen.addresses)
    found, unsure = _rooted(measured, norm_type, records, careful=chosen.table.has_float64)
    return found, _of_float64(chosen, unsure)


def records_for(chosen: Chosen) -> Floats:
    """Where the exponents of each block are counted."""
    return np.zeros((len(chosen.table.blocks), RECORD))


def counts(chosen: Chosen, records: Floats) -> Floats:
    """A row as of :mod:`distclip.common.exponents` for each tensor, from those of its blocks."""
    if len(records) > len(chosen.tensors):
        starts = np.searchsorted(chosen.table.owner, np.arange(len(chosen.tensors)))
        records = np.add.reduceat(records, starts, axis=0)
    return records[:, : exponents.COLUMNS]


def unit_norms(
    chosen: Chosen, norm_type: float, records: Floats | None = None
) -> tuple[Floats, list[int]]:
    """The p-norm of each row, p = 1, 2 or inf; as :func:`norms`, with a number for each row."""
    if norm_type == 2.0 and not chosen.table.has_float64:  # without another pass over many rows
        return _measured(chosen.table, chosen.addresses, "roots", records), []
    measured = functools.partial(_by_row, chosen.table, chosen.addresses)
    found, unsure = _rooted(measured, norm_type, records, careful=chosen.table.has_float64)
    return found, _of_float64(chosen, np.searchsorted(chosen.table.firsts, unsure, "right") - 1)


def _of_float64(chosen: Chosen, numbers: Integers) -> list[int]:
    """Indices of the tensors whose squares can leave the range of float64."""
    return [n for n in dict.fromkeys(numbers.tolist()) if chosen.tensors[n].dtype is torch.float64]


def segment_norms(
    values: Tensor, lengths: Sequence[int], norm_type: float, tables: Tables | None
) -> tuple[Floats, list[int]] | None:
    """As :func:`norms`, of consecutive runs of one contiguous float64 host tensor.

    Returns:
        None where there are no loops.
    """
    if Kind.FLOAT64 not in compiler.kinds() or not measures(norm_type):
        return None
    tables = Tables() if tables is None else tables
    table = tables.remembered(
        f"{len(lengths)} segments", lengths, lambda: table_of_segments(lengths)
    )
    measured = functools.partial(_wholes, table, np.array([values.data_ptr()]))
    found, unsure = _rooted(measured, norm_type, None, careful=True)
    return found, unsure.tolist()


def _wholes(table: Table, addresses: Integers, norm_type: float, records: Floats | None) -> Floats:
    """A number for each whole, from those of its rows."""
    rows = _by_row(table, addresses, norm_type, records)
    if len(rows) == len(table.counts):
        return rows
    combine = np.maximum if math.isinf(norm_type) else np.add
    return cast(Floats, combine.reduceat(rows, table.firsts))


def _by_row(table: Table, addresses: Integers, norm_type: float, records: Floats | None) -> Floats:
    return _measured(table, addresses, LOOPS[norm_type], records)


def _measured(table: Table, addresses: Integers, loop: str, records: Floats | None) -> Floats:
    """What this loop says of each row; with ``records``, that of its kind which also counts."""
    rows = np.zeros(table.rows)
    if records is None:
        _run(loop, table, addresses, rows)
    else:
        places = np.array([rows.ctypes.data, records.ctypes.data])
        _run(loop + COUNTED, table, addresses, places)
    return rows


def _run(name: str, table: Table, addresses: Integers, rows: Floats | Integers) -> None:
    loop = compiler.function(name)
    if loop is None:  # `choose` chose nothing then
        raise AssertionError(f"there is no compiled loop {name!r}")
    threads.run(loop, table, table.placed(addresses), rows.ctypes.data)


def _rooted(
    measured: Callable[[float, Floats | None], Floats],
    norm_type: float,
    records: Floats | None,
    *,
    careful: bool,
) -> tuple[Floats, Integers]:
    """The norms, and which of them cannot be trusted; ``careful`` where there is float64."""
    sums = measured(norm_type, records)
    if norm_type != 2.0:
        return sums, np.zeros(0, np.int64)
    unsure = np.zeros(0, np.int64)
    if careful and not ((sums > LEAST) & (sums < MOST)).all():
        # A sum of 0 may be what it is.
        unsure = ~((sums > LEAST) & (sums < MOST)) & (measured(math.inf, None) != 0.0)
        unsure = np.flatnonzero(unsure)
    return np.sqrt(sums, out=sums), unsure


def scale_(chosen: Chosen, coefficients: Floats) -> None:
    """Multiply each row by its coefficient, in float64, rounded once.

    Args:
        chosen: what is multiplied.
        coefficients: float64 ``(rows,)``. Rows whose coefficient is 1 are not touched.
    """
    _run("scale", chosen.table, chosen.addresses, np.ascontiguousarray(coefficients))


def scale_whole_(chosen: Chosen, coefficients: Floats) -> None:
    """Multiply each tensor by its coefficient, float64 ``(len(chosen.tensors),)``."""
    table = chosen.table
    each = coefficients if table.simple else np.repeat(coefficients, table.counts)
    scale_(chosen, each)


def clamp_(chosen: Chosen) -> None:
    """Clamp each tensor to the bound that it was chosen with, rounded to its dtype; keeps NaN."""
    _run("clamp", chosen.table, chosen.addresses, np.zeros(0))
