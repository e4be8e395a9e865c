"""Norms, multiplications and clamps of many host tensors, each in one call of a compiled loop."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from distclip.common import exponents
from distclip.common.rollups import Floats as Floats
from distclip.kernels.host import compiler, threads
from distclip.kernels.host.blocks import (
    CLAMPED,
    COUNTED,
    KIND_OF,
    RECORD,
    Blocks,
    Integers,
    Kind,
    Shape,
    shape_of,
    shape_of_units,
    table_of,
    table_of_contiguous,
    table_of_segments,
)
from distclip.kernels.look import PLAIN, Look, look, there

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
    table: Blocks
    addresses: Integers
    owners: Sequence[Tensor]

    def part(self, numbers: slice) -> Chosen:
        """Some of the tensors, one after another; their rows are numbered from 0."""
        table, addresses = self.table.part(numbers), self.addresses[numbers]
        return Chosen(self.tensors[numbers], None, table, addresses, self.owners[numbers])


@dataclass
class PlanTables:
    """The tables of the tensors of one plan, kept from step to step while nothing changes."""

    _known: dict[str, tuple[object, Any]] = field(default_factory=dict)

    def remembered(self, what: str, key: object, make: Callable[[], Made]) -> Made:
        """What ``make`` made for this key the last time; ``what`` tells one set from another."""
        known = self._known.get(what)
        if known is None or known[0] != key:
            known = self._known[what] = key, make()
        elif known[0] is not key:  # most of its parts will be the very objects, the next time
            known = self._known[what] = key, known[1]
        return cast(Made, known[1])


def choose(
    tensors: Sequence[Tensor | None],
    what: str = "",
    *,
    unit_dims: Sequence[Sequence[int]] | None = None,
    counts: Sequence[int] | None = None,
    tables: PlanTables | None = None,
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
        tables: remembered tables.
        seen: what a look at those that are there has found.
        pairs: whether complex numbers are two real ones each, as for 2-norms and multiplication.
    """
    kinds = compiler.compiled_kinds()
    if not kinds or not tensors:
        return None
    tables = PlanTables() if tables is None else tables
    seen = look(there(tensors)) if seen is None else seen
    if seen is not None and _takes(seen, kinds, unit_dims):
        return _chosen(tensors, what, counts, tables, seen)
    make = functools.partial(_select, tensors, kinds, unit_dims, counts, pairs)
    key = _layouts(tensors, unit_dims, counts, pairs)
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
    table: Blocks


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
            found.append((number, KIND_OF[tensor.dtype], shape))
    if not found:
        return None
    where, of_kinds, shapes = zip(*found, strict=True)
    table = table_of(of_kinds, shapes, units=unit_dims is not None)
    if counts is not None:
        table = table.within(_starts(counts, where), sum(counts))
    return _Selected(where, are_complex, table)


def _chosen(
    tensors: Sequence[Tensor | None],
    what: str,
    counts: Sequence[int] | None,
    tables: PlanTables,
    seen: Look,
) -> Chosen:
    """All of the tensors that are there; none has gaps."""
    positions: Sequence[int] | None = None
    if len(seen.tensors) < len(tensors):
        positions = [number for number, each in enumerate(tensors) if each is not None]

    def make() -> Blocks:
        kinds = [KIND_OF[dtype] for dtype in seen.dtypes]
        if counts is None:
            return table_of_contiguous(kinds, seen.numels)
        table = table_of_contiguous(kinds, seen.numels, _at(counts, positions))
        return table.within(_starts(counts, positions), sum(counts))

    key = seen.kinds, counts, positions
    table = tables.remembered(what, key, make)
    return Chosen(seen.tensors, positions, table, seen.addresses, seen.owners)


def _takes(seen: Look, kinds: frozenset[Kind], unit_dims: Sequence[Sequence[int]] | None) -> bool:
    """Whether the loops take all of them, their units as rows one after another in memory."""
    return (
        seen.on_host
        and all(KIND_OF.get(each) in kinds for each in seen.kinds.distinct)
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
        and KIND_OF.get(tensor.dtype) in kinds
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
        chosen: the tensors.
        norm_type: p.
        records: as of :func:`records_for`, where exponents are counted in the same reading.

    Returns:
        Float64 ``(len(chosen.tensors),)``; and which of them, counted from 0, are float64 tensors
        whose squares have left the range of float64.
    """
    sums = _of_wholes(_measured(chosen, norm_type, records), chosen.table, norm_type)
    return _rooted(sums, norm_type, chosen)


def clamped_norms(
    chosen: Chosen, norm_type: float, bounds: Floats
) -> list[tuple[Floats, list[int]]]:
    """The p-norms as if clamped, and as they are, of one reading; both as of :func:`norms`.

    Args:
        chosen: the tensors.
        norm_type: p.
        bounds: float64 ``(len(chosen.tensors),)``, as the tensors' dtypes hold them; inf for none.
    """
    table = chosen.table
    sums = _measured_clamped(chosen, norm_type, _each_row(table, bounds))
    return [_rooted(_of_wholes(each, table, norm_type), norm_type, chosen) for each in sums]


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
    chosen: Chosen,
    norm_type: float,
    records: Floats | None = None,
    *,
    bounds: Floats | None = None,
) -> tuple[Floats, list[int]]:
    """The p-norm of each row, p = 1, 2 or inf; as :func:`norms`, with a number for each row.

    With ``bounds``, float64 ``(len(chosen.tensors),)``, as if clamped.
    """
    table = chosen.table
    if bounds is not None:
        rows, _ = _measured_clamped(chosen, norm_type, _each_row(table, bounds))
    elif norm_type == 2.0 and not table.has_float64:  # without another pass over many rows
        return _run_measure("roots", chosen, records), []
    else:
        rows = _measured(chosen, norm_type, records)
    return _rooted(rows, norm_type, chosen, by_row=True)


def segment_norms(
    values: Tensor, lengths: Sequence[int], norm_type: float, tables: PlanTables | None
) -> tuple[Floats, list[int]] | None:
    """As :func:`norms`, of consecutive runs of one contiguous float64 host tensor.

    Returns:
        None where there are no loops.
    """
    if Kind.FLOAT64 not in compiler.compiled_kinds() or not measures(norm_type):
        return None
    tables = PlanTables() if tables is None else tables
    table = tables.remembered(
        f"{len(lengths)} segments", lengths, lambda: table_of_segments(lengths)
    )
    chosen = Chosen([values] * len(lengths), None, table, np.array([values.data_ptr()]), [values])
    sums = _of_wholes(_measured(chosen, norm_type, None), table, norm_type)
    return _rooted(sums, norm_type, chosen)


def _of_wholes(rows: Floats, table: Blocks, norm_type: float) -> Floats:
    """A number for each tensor, from those of its rows."""
    if len(rows) == len(table.counts):
        return rows
    combine = np.maximum if math.isinf(norm_type) else np.add
    with np.errstate(over="ignore"):  # inf, from which `_rooted` knows what to do
        return cast(Floats, combine.reduceat(rows, table.firsts))


def _measured(chosen: Chosen, norm_type: float, records: Floats | None) -> Floats:
    """The sum of p-th powers of each row, or its largest magnitude."""
    return _run_measure(LOOPS[norm_type], chosen, records)


def _run_measure(loop: str, chosen: Chosen, records: Floats | None) -> Floats:
    rows = np.zeros(chosen.table.rows)
    if records is None:
        _run(loop, chosen, rows)
    else:
        _run(loop + COUNTED, chosen, np.array([rows.ctypes.data, records.ctypes.data]))
    return rows


def _measured_clamped(chosen: Chosen, norm_type: float, bounds: Floats) -> tuple[Floats, Floats]:
    """As :func:`_measured`, as if each row was clamped to its bound; and as it is."""
    if math.isinf(norm_type):
        raw = _measured(chosen, norm_type, None)
        return np.minimum(raw, bounds), raw
    clamped, raw = bounds.copy(), np.zeros_like(bounds)
    _run(LOOPS[norm_type] + CLAMPED, chosen, np.array([clamped.ctypes.data, raw.ctypes.data]))
    return clamped, raw


def _run(name: str, chosen: Chosen, rows: Floats | Integers) -> None:
    loop = compiler.function(name)
    if loop is None:  # `choose` chose nothing then
        raise AssertionError(f"there is no compiled loop {name!r}")
    table = chosen.table
    threads.run_blocks(loop, table, table.placed(chosen.addresses), rows.ctypes.data)


def _rooted(
    sums: Floats, norm_type: float, chosen: Chosen, *, by_row: bool = False
) -> tuple[Floats, list[int]]:
    """Norms from sums, of tensors or of rows; and which tensors are not to be trusted."""
    if norm_type != 2.0:
        return sums, []
    unsure: list[int] = []
    if chosen.table.has_float64 and not ((sums > LEAST) & (sums < MOST)).all():
        # A sum of 0 may be what it is.
        largest = _measured(chosen, math.inf, None)
        if not by_row:
            largest = _of_wholes(largest, chosen.table, math.inf)
        found = np.flatnonzero(~((sums > LEAST) & (sums < MOST)) & (largest != 0.0))
        if by_row:
            found = np.searchsorted(chosen.table.firsts, found, "right") - 1
        tensors = dict.fromkeys(found.tolist())
        unsure = [n for n in tensors if chosen.tensors[n].dtype is torch.float64]
    return np.sqrt(sums, out=sums), unsure


def _each_row(table: Blocks, numbers: Floats) -> Floats:
    """A number for each row, from those of the tensors; 0 for rows of what is not in the table."""
    each = numbers if table.simple else np.repeat(numbers, table.counts)
    if len(each) == table.rows:
        return each
    found, done = np.zeros(table.rows), np.cumsum(table.counts) - table.counts
    found[np.repeat(table.firsts - done, table.counts) + np.arange(len(each))] = each
    return found


def scale_(chosen: Chosen, coefficients: Floats) -> None:
    """Multiply each row by its coefficient, in float64, rounded once.

    Args:
        chosen: what is multiplied.
        coefficients: float64 ``(rows,)``. Rows whose coefficient is 1 are not touched.
    """
    _run("scale", chosen, np.ascontiguousarray(coefficients))


def scale_whole_(chosen: Chosen, coefficients: Floats) -> None:
    """Multiply each tensor by its coefficient, float64 ``(len(chosen.tensors),)``."""
    scale_(chosen, _each_row(chosen.table, coefficients))


def clamp_(chosen: Chosen, bounds: Floats) -> None:
    """Clamp each tensor to its bound, float64 ``(len(chosen.tensors),)``, rounded to its dtype.

    NaN stays NaN. Tensors whose bound is inf are not touched.
    """
    _run("clamp", chosen, np.ascontiguousarray(_each_row(chosen.table, bounds)))
