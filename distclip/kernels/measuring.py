"""Norms of local tensors and of their units: the door that the rest of the package goes through.

Which of three ways a tensor takes, nobody else has to know: host tensors are measured by compiled
loops (:mod:`distclip.kernels.host`), accelerator tensors by Triton kernels or torch's multi-tensor
operations (:mod:`distclip.kernels.device`), and whatever neither takes (complex numbers, other
orders, strange strides, hosts without a compiler) by plain torch operations
(:mod:`distclip.kernels.plain`). All of them add in float64. Nothing reads a value of an accelerator
tensor on the host.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from distclip.kernels import plain
from distclip.kernels.bounds import all_held
from distclip.kernels.device import norms as device_norms
from distclip.kernels.exponents import Counting
from distclip.kernels.host import choosing, compiler
from distclip.kernels.host import kernels as host
from distclip.kernels.host.blocks import KIND_OF, Kind
from distclip.kernels.host.choosing import Chosen
from distclip.kernels.host.choosing import PlanTables as PlanTables
from distclip.kernels.host.kernels import Floats
from distclip.kernels.look import Look as Look
from distclip.kernels.transfer import to_device


def norms(
    tensors: Sequence[Tensor | None],
    norm_type: float,
    *,
    device: torch.device,
    tables: PlanTables | None = None,
    what: str = "",
    seen: Look | None = None,
    counting: Counting | None = None,
) -> Tensor:
    """p-norm of each tensor.

    Args:
        tensors: local tensors of any dtype, shape and device; None counts as 0.
        norm_type: p > 0 or inf.
        device: where the result goes.
        tables: what is remembered of the tensors from step to step.
        what: which of the sets of tensors in ``tables`` these are.
        seen: what a look at those that are there has found.
        counting: counts the exponents of those for which that takes no second reading.

    Returns:
        float64 tensor of shape ``(len(tensors),)``. NaN and inf elements give NaN and inf.
    """
    chosen = None
    if host.measures(norm_type):
        pairs = norm_type == 2.0
        chosen = choosing.choose(tensors, what, tables=tables, seen=seen, pairs=pairs)
    values = None
    if chosen is not None:
        if counting is not None:
            found, doubtful = counting.reading(host.norms, chosen, norm_type)
        else:
            found, doubtful = host.norms(chosen, norm_type)
        for number in doubtful:
            found[number] = float(plain.norm(chosen.tensors[number], norm_type, None))
        values = torch.from_numpy(found).to(device)
        if chosen.positions is None:
            return values
    result = torch.zeros(len(tensors), dtype=torch.float64, device=device)
    done: Sequence[int] = ()
    if chosen is not None and chosen.positions is not None and values is not None:
        done = chosen.positions
        result = device_norms.placed(result, done, values)
    for positions in _others(tensors, done):
        some = [cast(Tensor, tensors[position]) for position in positions]
        here = None if counting is None else Counting(len(some), some[0].device)
        if some[0].is_cpu:
            measured = plain.norms(some, norm_type)
        else:
            measured = device_norms.norms(some, norm_type, counting=here)
        if counting is not None and here is not None:
            counting.absorb(here, positions)
        result = device_norms.placed(result, positions, measured)
    return result


def has_loops(dtypes: Collection[str], orders: Collection[float]) -> bool:
    """Whether the compiled loops measure norms of these orders, of host tensors of these dtypes.

    In one reading in any case, which of float64 numbers may not do.
    """
    kinds = compiler.compiled_kinds() - {Kind.FLOAT64}
    known = all(KIND_OF.get(getattr(torch, dtype)) in kinds for dtype in dtypes)
    return known and all(map(host.measures, orders))


def norms_again(seen: Look, norm_type: float, *, tables: PlanTables, what: str) -> Tensor | None:
    """:func:`norms`, in the same bits, of host tensors that are what it measured last.

    Args:
        seen: the tensors, none of which is missing.
        norm_type: as for :func:`norms`.
        tables: as for :func:`norms`.
        what: as for :func:`norms`.

    Returns:
        float64 ``(len(seen.tensors),)``; None where the tensors are others, not all were measured
        by the compiled loops, or one is float64, which may take a second reading.
    """
    table = tables.of_all(what, seen.kinds) if host.measures(norm_type) else None
    if table is None or table.has_float64:
        return None
    return host.norms_of(table, seen.places.addresses, norm_type)


def clamped_norms_again(
    seen: Look, norm_type: float, bounds: Floats, *, tables: PlanTables, what: str
) -> tuple[Tensor, Tensor] | None:
    """:func:`clamped_norms`, in the same bits; all else is as of :func:`norms_again`."""
    table = tables.of_all(what, seen.kinds) if host.measures(norm_type) else None
    if table is None or table.has_float64:
        return None
    rows = host.bounds_of(tables, what, table, bounds, seen.kinds)
    return host.clamped_norms_of(table, seen.places.addresses, norm_type, rows)


def clamped_norms(
    tensors: Sequence[Tensor | None],
    norm_type: float,
    bounds: Floats,
    *,
    device: torch.device,
    raw: bool,
    tables: PlanTables | None = None,
    what: str = "",
    seen: Look | None = None,
) -> tuple[Tensor, Tensor | None]:
    """p-norm of each tensor as if clamped to its bound first, and as it is.

    Args:
        tensors: as for :func:`norms`.
        norm_type: p > 0 or inf.
        bounds: float64 ``(len(tensors),)``, measure ``clamp(x, -bound, bound)``; inf for as it is.
        device: where the results go.
        raw: whether the norms as they are have to be known; on the host they are in any case.
        tables: as for :func:`norms`.
        what: as for :func:`norms`.
        seen: as for :func:`norms`.

    Returns:
        As of :func:`norms`, as if clamped; and as they are, alike to the last bit where no element
        exceeds its bound. None in place of these on an accelerator where they are not asked for.
    """
    limits = _held(tensors, bounds, seen)
    chosen = None
    if host.measures(norm_type):
        chosen = choosing.choose(tensors, what, tables=tables, seen=seen)
    done: Sequence[int] = ()
    both = [torch.zeros(len(tensors), dtype=torch.float64, device=device) for _ in (0, 1)]
    if chosen is not None:
        places = chosen.positions
        some_limits = limits if places is None else limits[list(places)]
        arrays = []
        measured_twice = host.clamped_norms(chosen, norm_type, some_limits)
        for limit, (values, doubtful) in zip((some_limits, None), measured_twice, strict=True):
            for number in doubtful:
                bound = None if limit is None else float(limit[number])
                values[number] = float(plain.norm(chosen.tensors[number], norm_type, bound))
            arrays.append(torch.from_numpy(values).to(device))
        if places is None:
            return arrays[0], arrays[1]
        done = places
        both = list(map(device_norms.placed, both, [done] * 2, arrays))
    for positions in _others(tensors, done):
        some = [cast(Tensor, tensors[position]) for position in positions]
        measure = plain.norms if some[0].is_cpu else device_norms.norms
        # Without a bound in the same way as with one: so they differ only where it is exceeded.
        for number, read in enumerate((limits, np.full_like(limits, math.inf))):
            if number == 0 or raw or some[0].is_cpu:
                each = _or_none(read, bounds, positions)
                both[number] = device_norms.placed(
                    both[number], positions, measure(some, norm_type, each)
                )
    return both[0], both[1] if raw or device.type == "cpu" else None


def unit_norms(
    tensors: Sequence[Tensor | None],
    unit_dims: Sequence[Sequence[int]],
    counts: Sequence[int],
    norm_type: float,
    bounds: Floats | None = None,
    *,
    raw: bool = False,
    device: torch.device,
    tables: PlanTables | None = None,
    what: str = "",
    seen: Look | None = None,
    counting: Counting | None = None,
) -> Tensor:
    """p-norm of each unit of each tensor.

    Args:
        tensors: local tensors of any dtype, shape and device; None counts as 0.
        unit_dims: per tensor, the dims that index its units; all others are reduced. ``()``: one
            unit.
        counts: per tensor, how many units it has.
        norm_type: p > 0 or inf.
        bounds: as for :func:`clamped_norms`; None for none.
        raw: with ``bounds``, measure as it is, in the way in which it is measured as if clamped.
        device: where the result goes.
        tables: what is remembered of the tensors from step to step.
        what: which of the sets of tensors in ``tables`` these are.
        seen: what a look at those that are there has found.
        counting: as for :func:`norms`.

    Returns:
        float64 ``(sum(counts),)``: the tensors one after another, each in row-major order of its
        ``unit_dims``.
    """
    limits = None
    if bounds is not None:
        limits = np.full_like(bounds, math.inf) if raw else _held(tensors, bounds, seen)
    pairs = norm_type == 2.0 and bounds is None
    chosen = None
    if host.measures(norm_type):
        chosen = choosing.choose(tensors, what, unit_dims, counts, tables, seen, pairs=pairs)
    return _unit_norms(
        tensors, unit_dims, counts, norm_type, bounds, limits, device, chosen, counting
    )


def unit_norms_by_parts(
    tensors: Sequence[Tensor | None],
    unit_dims: Sequence[Sequence[int]],
    counts: Sequence[int],
    norm_type: float,
    parts: Sequence[slice],
    *,
    device: torch.device,
    tables: PlanTables,
    what: str,
    seen: Look | None = None,
) -> Iterator[Tensor]:
    """:func:`unit_norms` of one of ``parts`` of the tensors after another.

    All other arguments are as there.
    """
    chosen, pairs = None, norm_type == 2.0
    if host.measures(norm_type):
        chosen = choosing.choose(tensors, what, unit_dims, counts, tables, seen, pairs=pairs)
    for part in parts:
        some, dims, several = tensors[part], unit_dims[part], counts[part]
        if chosen is not None and chosen.positions is None:
            theirs = chosen.part(part)
            yield _unit_norms(some, dims, several, norm_type, None, None, device, theirs, None)
        else:
            name = f"{what} from {part.start}"
            yield unit_norms(
                some, dims, several, norm_type, device=device, tables=tables, what=name
            )


def _unit_norms(
    tensors: Sequence[Tensor | None],
    unit_dims: Sequence[Sequence[int]],
    counts: Sequence[int],
    norm_type: float,
    bounds: Floats | None,
    limits: Floats | None,
    device: torch.device,
    chosen: Chosen | None,
    counting: Counting | None,
) -> Tensor:
    """:func:`unit_norms`, of which the compiled loops measure those that were ``chosen``.

    As if clamped to ``limits``, where there are ``bounds``.
    """
    result: Tensor | None = None
    done: set[int] = set()
    if chosen is not None:
        positions = range(len(tensors)) if chosen.positions is None else chosen.positions
        if counting is not None and limits is None:
            found, doubtful = counting.reading(host.unit_norms, chosen, norm_type)
        else:
            some_limits = None if limits is None else limits[list(positions)]
            found, doubtful = host.unit_norms(chosen, norm_type, bounds=some_limits)
        if chosen.positions is None and not doubtful:
            return torch.from_numpy(found).to(device)
        done = set(positions).difference(positions[number] for number in doubtful)
        result = torch.from_numpy(found).to(device)
    for positions in _others(tensors, list(done)):
        rows = [
            plain.unit_rows(cast(Tensor, tensors[place]), unit_dims[place], counts[place])
            for place in positions
        ]
        each: list[float | None] | None = None
        if bounds is not None and limits is not None:
            each = _or_none(limits, bounds, positions)
        measure = plain.row_norms if rows[0].is_cpu else device_norms.row_norms
        values = measure(rows, norm_type, each).to(device)
        if result is None and len(values) == sum(counts):
            return values
        if result is None:
            result = torch.zeros(sum(counts), dtype=torch.float64, device=device)
        result.index_copy_(0, to_device(_units_of(counts, positions), device), values)
    if result is None:
        result = torch.zeros(sum(counts), dtype=torch.float64, device=device)
    return result


def segment_norms(
    values: Tensor, lengths: Tensor, counts: Sequence[int], norm_type: float, tables: PlanTables
) -> Tensor:
    """p-norms of consecutive runs of norms: of wholes, from those of their parts.

    Args:
        values: contiguous float64 ``(sum(counts),)``, none negative.
        lengths: ``counts`` as an int64 tensor on the same device; 0 gives norm 0.
        counts: how many numbers each run has.
        norm_type: p > 0 or inf.
        tables: what is remembered of the lengths from step to step.

    Returns:
        float64 ``(len(counts),)``.
    """
    found = host.segment_norms(values, counts, norm_type, tables) if values.is_cpu else None
    if found is None:
        return plain.segment_norms(values, lengths, norm_type)
    norms, doubtful = found
    for number in doubtful:
        start = sum(counts[:number])
        part = values[start : start + counts[number]]
        norms[number] = float(plain.norm(part, norm_type, None))
    return torch.from_numpy(norms)


def _units_of(counts: Sequence[int], positions: Sequence[int]) -> npt.NDArray[np.int64]:
    """Where the units of some tensors lie in the vector of the units of all."""
    stops = np.cumsum(counts)
    return np.concatenate([np.arange(stops[p] - counts[p], stops[p]) for p in positions])


def _held(tensors: Sequence[Tensor | None], bounds: Floats, seen: Look | None) -> Floats:
    """The bounds, each as its tensor's dtype holds it."""
    if seen is not None and len(seen.kinds.dtypes) == len(tensors):
        return all_held(bounds, seen.kinds.dtypes)
    return all_held(bounds, [torch.float64 if t is None else t.dtype for t in tensors])


def _or_none(limits: Floats, bounds: Floats, positions: Sequence[int]) -> list[float | None]:
    """The limits at some positions, None where there is no bound."""
    return [float(limits[p]) if math.isfinite(bounds[p]) else None for p in positions]


def _others(tensors: Sequence[Tensor | None], done: Sequence[int]) -> list[list[int]]:
    """The tensors that are left to be measured, those of one device together."""
    known = set(done)
    by_device: dict[torch.device, list[int]] = {}
    for position, tensor in enumerate(tensors):
        if tensor is not None and position not in known and tensor.numel():
            by_device.setdefault(tensor.device, []).append(position)
    return list(by_device.values())
