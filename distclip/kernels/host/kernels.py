"""Norms, multiplications and clamps of many host tensors, each in one call of a compiled loop."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
from torch import Tensor

from distclip.common import exponents
from distclip.common.rollups import Floats as Floats
from distclip.kernels.bounds import all_held
from distclip.kernels.host import compiler, threads
from distclip.kernels.host.blocks import (
    CLAMPED,
    COUNTED,
    RECORD,
    Blocks,
    Integers,
    Kind,
    table_of_segments,
)
from distclip.kernels.host.choosing import Chosen, PlanTables
from distclip.kernels.look import Kinds

LOOPS = {1.0: "magnitudes", 2.0: "squares", math.inf: "largest"}
"""Orders of norms, and the loops that measure them."""
HOST = torch.device("cpu")
"""Where loops write, whatever device the caller has made the default."""
LEAST, MOST = 1e-280, 1e300
"""Sums of squares of float64 numbers between these have lost nothing to underflow or overflow."""


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


def norms_of(table: Blocks, addresses: Integers, norm_type: float) -> Tensor:
    """The p-norm of each tensor of a table without float64 numbers; float64 ``(tensors,)``."""
    rows = torch.zeros(table.rows, dtype=torch.float64, device=HOST)
    roots = norm_type == 2.0 and table.simple
    _run("roots" if roots else LOOPS[norm_type], table, addresses, rows.data_ptr())
    return rows if roots else _norms_from(rows, table, norm_type)


def clamped_norms_of(
    table: Blocks, addresses: Integers, norm_type: float, rows: Floats
) -> tuple[Tensor, Tensor]:
    """As :func:`norms_of`, as if each row was clamped to its bound in ``rows``; and as it is."""
    raw = torch.zeros(table.rows, dtype=torch.float64, device=HOST)
    if math.isinf(norm_type):
        _run(LOOPS[norm_type], table, addresses, raw.data_ptr())
        clamped = torch.minimum(raw, torch.from_numpy(rows))
    else:
        clamped = torch.from_numpy(rows.copy())
        both = torch.tensor([clamped.data_ptr(), raw.data_ptr()], device=HOST)
        _run(LOOPS[norm_type] + CLAMPED, table, addresses, both.data_ptr())
    return _norms_from(clamped, table, norm_type), _norms_from(raw, table, norm_type)


def _norms_from(rows: Tensor, table: Blocks, norm_type: float) -> Tensor:
    """The norm of each tensor, from the numbers of its rows.

    By numpy's root, which is rounded correctly; torch's is not always.
    """
    norms = rows.numpy() if table.simple else _of_wholes(rows.numpy(), table, norm_type)
    return torch.from_numpy(np.sqrt(norms, out=norms) if norm_type == 2.0 else norms)


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
    sums = _measured_clamped(chosen, norm_type, each_row(table, bounds))
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
        rows, _ = _measured_clamped(chosen, norm_type, each_row(table, bounds))
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
        _run_on(chosen, loop, rows)
    else:
        _run_on(chosen, loop + COUNTED, np.array([rows.ctypes.data, records.ctypes.data]))
    return rows


def _measured_clamped(chosen: Chosen, norm_type: float, bounds: Floats) -> tuple[Floats, Floats]:
    """As :func:`_measured`, as if each row was clamped to its bound; and as it is."""
    if math.isinf(norm_type):
        raw = _measured(chosen, norm_type, None)
        return np.minimum(raw, bounds), raw
    clamped, raw = bounds.copy(), np.zeros_like(bounds)
    _run_on(chosen, LOOPS[norm_type] + CLAMPED, np.array([clamped.ctypes.data, raw.ctypes.data]))
    return clamped, raw


def _run(name: str, table: Blocks, addresses: Integers, values: int) -> None:
    loop = compiler.function(name)
    if loop is None:  # `choose` chose nothing then
        raise AssertionError(f"there is no compiled loop {name!r}")
    table.place(addresses)
    threads.run_blocks(loop, table, values)


def _run_on(chosen: Chosen, name: str, rows: Floats | Integers) -> None:
    _run(name, chosen.table, chosen.addresses, rows.ctypes.data)


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


def each_row(table: Blocks, numbers: Floats) -> Floats:
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
    _run_on(chosen, "scale", np.ascontiguousarray(coefficients))


def scale_all_(table: Blocks, addresses: Integers, coefficient: float) -> None:
    """Multiply all tensors of a table by one number."""
    rows = torch.full((table.rows,), coefficient, dtype=torch.float64, device=HOST)
    _run("scale", table, addresses, rows.data_ptr())


def scale_whole_(chosen: Chosen, coefficients: Floats) -> None:
    """Multiply each tensor by its coefficient, float64 ``(len(chosen.tensors),)``."""
    scale_(chosen, each_row(chosen.table, coefficients))


def bounds_of(tables: PlanTables, what: str, table: Blocks, bounds: Floats, kinds: Kinds) -> Floats:
    """The bound of each row of a table, as its dtype holds it; remembered as that of ``what``."""

    def held() -> Floats:
        return each_row(table, all_held(bounds, kinds.dtypes))

    return tables.remembered(f"bounds of {what}", (kinds, bounds.tobytes()), held)


def clamp_all_(table: Blocks, addresses: Integers, rows: Floats) -> None:
    """Clamp each row of a table to its bound, float64 ``(rows,)``, as its dtype holds it."""
    _run("clamp", table, addresses, rows.ctypes.data)


def clamp_(chosen: Chosen, bounds: Floats) -> None:
    """Clamp each tensor to its bound, float64 ``(len(chosen.tensors),)``, rounded to its dtype.

    NaN stays NaN. Tensors whose bound is inf are not touched.
    """
    _run_on(chosen, "clamp", np.ascontiguousarray(each_row(chosen.table, bounds)))
