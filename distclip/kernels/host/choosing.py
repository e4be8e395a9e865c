"""Which host tensors the compiled loops take, and the tables that describe them to the loops."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from distclip.kernels.host import compiler
from distclip.kernels.host.blocks import (
    KIND_OF,
    Blocks,
    Integers,
    Kind,
    Shape,
    shape_of,
    shape_of_units,
    table_of,
    table_of_contiguous,
)
from distclip.kernels.look import PLAIN, Kinds, Look, look, positions_there, there

Made = TypeVar("Made")
Each = TypeVar("Each")

_dtype, _shape, _is_cpu = map(operator.attrgetter, ("dtype", "shape", "is_cpu"))


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

    def of_all(self, what: str, kinds: Kinds) -> Blocks | None:
        """The table that :func:`choose` made last for ``what``, if it took all, of these kinds.

        Of these very kinds: a comparison of what they are would cost time.
        """
        key, table = self._known.get(what, (None, None))
        same = type(key) is tuple and key[0] is kinds and key[1] is None
        return cast(Blocks, table) if same else None


def choose(
    tensors: Sequence[Tensor | None],
    what: str = "",
    unit_dims: Sequence[Sequence[int]] | None = None,
    counts: Sequence[int] | None = None,
    tables: PlanTables | None = None,
    seen: Look | None = None,
    *,
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
        positions = positions_there(tensors)

    def make() -> Blocks:
        kinds = [KIND_OF[dtype] for dtype in seen.kinds.dtypes]
        if counts is None:
            return table_of_contiguous(kinds, seen.kinds.numels)
        table = table_of_contiguous(kinds, seen.kinds.numels, _at(counts, positions))
        return table.within(_starts(counts, positions), sum(counts))

    key = seen.kinds, counts, None if counts is None else positions
    table = tables.remembered(what, key, make)
    return Chosen(seen.tensors, positions, table, seen.places.addresses, seen.owners)


def _takes(seen: Look, kinds: frozenset[Kind], unit_dims: Sequence[Sequence[int]] | None) -> bool:
    """Whether the loops take all of them, their units as rows one after another in memory."""
    return (
        seen.kinds.on_host
        and all(KIND_OF.get(each) in kinds for each in seen.kinds.distinct)
        and (unit_dims is None or (seen.places.row_major and _are_first(unit_dims)))
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
