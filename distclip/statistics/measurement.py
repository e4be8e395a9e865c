"""One measuring pass: local norms, packed into one all-reduce, unpacked as whole-tensor norms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import NoneType
from typing import TypeAlias

import torch
from torch import Tensor

from distclip.common.exponents import COLUMNS
from distclip.errors import DistclipError
from distclip.kernels import exponents, measuring
from distclip.kernels.measuring import Look, Tables
from distclip.kernels.transfer import to_device
from distclip.layouts import soundness, sparse
from distclip.layouts.fetching import Fetched
from distclip.layouts.piece import MisplacedError
from distclip.layouts.plan import Plan
from distclip.statistics.early import Early
from distclip.statistics.overlap import Overlap
from distclip.statistics.request import Request
from distclip.statistics.units import LocalUnits, Segments, UnitTable


@dataclass
class LocalMeasurement:
    """What this rank measured. ``position`` is the index of a piece in the plan.

    Attributes:
        norms: order -> ``(pieces,)`` float64, 0 where not measured or not counted.
        raw: the same without the clamping, for ``raw_orders``.
        weights: order -> ``(pieces,)``.
        units: the units on this rank, of the pieces that are measured so.
        trouble: what went wrong here; every rank has to learn of it before anybody raises.
        present: pieces that have a gradient, with it.
        seen: what a look at ``present`` has found, where nothing in it is unusual.
        misplaced: whether a gradient here has to be redistributed, by all ranks of its mesh.
        loss: float64 ``(2,)``, the sum of the losses given on this rank, and how many those are.
        exponents: float64 ``(parameters, columns)``, the elements here; None where not asked for.
        sparse: whether any gradient is, so that ``present`` has its values in its place.
    """

    norms: dict[float, Tensor] = field(default_factory=dict)
    raw: dict[float, Tensor] = field(default_factory=dict)
    weights: dict[float, Tensor] = field(default_factory=dict)
    units: LocalUnits = field(default_factory=lambda: LocalUnits())
    trouble: DistclipError | None = None
    present: Sequence[Tensor | None] = ()
    seen: Look | None = None
    misplaced: bool = False
    loss: Tensor | None = None
    exponents: Tensor | None = None
    sparse: bool = False

    def dense(self, plan: Plan) -> Sequence[Tensor | None]:
        """``present``, with what is sparse written out."""
        if not self.sparse:
            return self.present
        pairs = zip(plan.pieces, self.present, strict=True)
        return [sparse.dense(piece, gradient) for piece, gradient in pairs]

    def divide(self, scale: Tensor) -> None:
        """Divide all gradient norms by a 0-dim loss scale."""
        for by_order in (self.norms, self.raw, self.units.norms):
            for order in by_order:
                by_order[order] = by_order[order] / scale


@dataclass
class Memory:
    """What is remembered from step to step.

    Attributes:
        tables: of the plan's tensors, for the kernels.
        habits: ``"misplaced"`` once gradients had to be redistributed, ``"rehearsed"`` once the
            policies of later passes were tried; the same on every rank.
        overlap: what measures during backward for the first pass.
        inspected: the places of the pieces whose gradients' memory and shape were looked at.
        only_measures: whether nothing is changed, so that memory may be shared.
        kinds: of what kinds the gradients were when every piece had one.
    """

    tables: Tables = field(default_factory=Tables)
    habits: set[str] = field(default_factory=set)
    overlap: Overlap | None = None
    inspected: set[int] = field(default_factory=set)
    only_measures: bool = False
    kinds: Kinds | None = None

    def find(self, plan: Plan) -> Fetched | None:
        """The gradients, where every piece has one and each is of the kind that it was before."""
        found = None if self.kinds is None else plan.fetching()
        seen = None if found is None else found.seen
        return found if seen is not None and _kinds_of(seen) == self.kinds else None


Kinds: TypeAlias = tuple[list[torch.dtype], list[int], bool]
"""Dtypes and numbers of elements of all pieces, and whether they are on the host."""


def _kinds_of(seen: Look) -> Kinds:
    return seen.dtypes, seen.numels, seen.on_host


def measure(
    plan: Plan,
    request: Request,
    table: UnitTable,
    memory: Memory,
    early: Early | None = None,
    fetched: Fetched | None = None,
) -> LocalMeasurement:
    """Measure this rank's pieces, but for what came ``early``. Issues no collective."""
    result = LocalMeasurement()
    if fetched is None:
        fetched = plan.fetching() or Fetched(_fetched(plan, result), None)
    present = _inspected(plan, request, fetched, result, memory)
    counted = _counted(plan, request, present)
    bounds = [request.bounds.get(piece.index) for piece in plan.pieces] if request.bounds else None
    weights: Sequence[Tensor | None] = [None] * len(plan.pieces)  # the step is lost with trouble
    if result.trouble is None and (request.weight_orders or request.unit_dims):
        weights = _weights(plan, request, result)
    if request.unit_dims:
        result.units = _measure_units(plan, request, table, weights, result, memory, early)
    if early is not None:
        counted = early.rest(counted, range(len(counted)))
    for order in request.orders:
        if len(table.positions) == len(plan.pieces) and bounds is None:
            norms = torch.zeros(len(plan.pieces), dtype=torch.float64, device=plan.device)
        else:
            norms = measuring.norms(
                counted,
                order,
                bounds,
                device=plan.device,
                tables=memory.tables,
                what="gradients",
                seen=result.seen if counted is present else None,
            )
            if early is not None:
                early.insert(norms, order)
        if table.positions:
            units = result.units.norms[order]
            whole = piece_norms(plan, units, table.local, table.index, memory.tables, order)
            norms.index_copy_(0, table.index, whole)
        result.norms[order] = norms
    if request.bounds:
        _measure_raw(plan, request, result)
    if request.exponents:
        result.exponents = _exponents(plan, result)
    if not request.weight_orders:
        return result
    weighted: list[Tensor | None] = [
        weight
        if piece.index in request.weighted
        and piece.share > 0.0
        and (piece.trainable or gradient is not None)
        else None
        for piece, weight, gradient in zip(plan.pieces, weights, present, strict=True)
    ]
    for order in request.weight_orders:
        result.weights[order] = measuring.norms(
            weighted, order, device=plan.device, tables=memory.tables, what="weights"
        )
    return result


def _weights(plan: Plan, request: Request, result: LocalMeasurement) -> Sequence[Tensor | None]:
    """The local weights of every piece whose weights are measured."""
    at_once = plan.fetching.weights()
    if at_once is not None:
        return at_once
    weights: list[Tensor | None] = []
    for piece, gradient in zip(plan.pieces, result.present, strict=True):
        wanted = piece.index in request.weighted or piece.index in request.unit_dims
        read = wanted and (piece.trainable or gradient is not None)
        try:
            weights.append(piece.weight() if read else None)
        except DistclipError as trouble:
            weights.append(None)
            result.trouble = result.trouble or trouble
    return weights


def _fetched(plan: Plan, result: LocalMeasurement) -> list[Tensor | None]:
    """The gradient of every piece, asked one by one; what cannot be measured is noted."""
    present: list[Tensor | None] = []
    for piece in plan.pieces:
        try:
            present.append(piece.gradient())
        except DistclipError as trouble:
            present.append(None)
            result.trouble = result.trouble or trouble
        except MisplacedError:
            present.append(None)
            result.misplaced = True
    return present


def _inspected(
    plan: Plan,
    request: Request,
    fetched: Fetched,
    result: LocalMeasurement,
    memory: Memory,
) -> Sequence[Tensor | None]:
    """What of the fetched gradients is measured and acted on; what is wrong is noted."""
    gradients, seen = fetched
    here: Sequence[int] = range(len(gradients))
    if seen is None or len(seen.tensors) < len(gradients):
        here = [place for place, gradient in enumerate(gradients) if gradient is not None]
    first = len(memory.inspected) < len(here) or not memory.inspected.issuperset(here)
    if request.unit_dims and not first:  # rows of another shape are other rows
        shapes = zip(plan.pieces, gradients, strict=True)
        first = any(g is not None and g.shape != piece.box.extents for piece, g in shapes)
    present, trouble, result.seen = soundness.inspect(
        plan, gradients, seen, first=first, changed=not memory.only_measures
    )
    if memory.kinds is None and result.seen is not None:
        everywhere = len(result.seen.tensors) == len(plan.pieces)
        memory.kinds = _kinds_of(result.seen) if everywhere else None
    if trouble is None and first:
        memory.inspected.update(here)
    result.present, result.trouble = present, result.trouble or trouble
    if present is not gradients:  # something unusual was found, or looked for
        result.sparse = any(each is not None and sparse.is_sparse(each) for each in gradients)
    return present


def _counted(
    plan: Plan, request: Request, present: Sequence[Tensor | None]
) -> Sequence[Tensor | None]:
    """The gradients that are measured as a whole and counted by this rank; None for all others."""
    if not request.unit_dims and plan.shares is None:
        return present
    return [
        None if piece.share == 0.0 or piece.index in request.unit_dims else gradient
        for piece, gradient in zip(plan.pieces, present, strict=True)
    ]


def _exponents(plan: Plan, result: LocalMeasurement) -> Tensor:
    """The counted elements of each parameter here by binary exponent; of zeros with trouble."""
    size = len(plan.entries), COLUMNS
    table = torch.zeros(size, dtype=torch.float64, device=plan.device)
    present = result.dense(plan) if result.trouble is None else ()
    for piece, gradient in zip(plan.pieces, present, strict=False):
        if gradient is not None and piece.share > 0.0:
            table[piece.index] += exponents.counts(gradient).to(plan.device) * piece.share
    return table


def _measure_raw(plan: Plan, request: Request, result: LocalMeasurement) -> None:
    """Norms as they are before the clamping: only clamped pieces are read once more."""
    clamped: list[Tensor | None] = [
        gradient if piece.index in request.bounds and piece.share > 0.0 else None
        for piece, gradient in zip(plan.pieces, result.present, strict=True)
    ]
    chosen = to_device([piece.index in request.bounds for piece in plan.pieces], plan.device) > 0
    # In the same way as with a bound, so that they differ only where something was clamped.
    unbounded = [math.inf] * len(clamped)
    for order in request.raw_orders:
        raw = measuring.norms(clamped, order, unbounded, device=plan.device)
        result.raw[order] = torch.where(chosen, raw, result.norms[order])


def _measure_units(
    plan: Plan,
    request: Request,
    table: UnitTable,
    weights: Sequence[Tensor | None],
    measured: LocalMeasurement,
    memory: Memory,
    early: Early | None,
) -> LocalUnits:
    """Norms of all units on this rank, of each order a vector for gradients and one for weights.

    Pieces of a replica that is counted elsewhere have the norm 0, unless they are decided here.
    """
    gradients, weighted = table.of(measured.dense(plan)), table.of(weights)
    seen = None if measured.seen is None or measured.sparse else table.seen(measured.seen)
    missing: list[int] = []
    if table.uncounted or (seen is None and NoneType in set(map(type, gradients))):
        seen = None
        gradients = [None if n in table.uncounted else each for n, each in enumerate(gradients)]
        missing = [number for number, each in enumerate(gradients) if each is None]
        # Of a unit cut across ranks the weight counts even where this rank's gradient is missing.
        unread = {n for n in missing if n < table.decided or not table.trainable[n]}
        unread |= table.uncounted
        weighted = [None if n in unread else each for n, each in enumerate(weighted)]
    bounds = None
    if request.bounds:
        bounds = [request.bounds.get(plan.pieces[position].index) for position in table.positions]

    def of(tensors: Sequence[Tensor | None], order: float, what: str) -> Tensor:
        return measuring.unit_norms(
            tensors,
            table.dims,
            table.local.counts,
            order,
            bounds if what == "gradients of units" else None,
            device=plan.device,
            tables=memory.tables,
            what=what,
            seen=seen if what == "gradients of units" else None,
        )

    norms: dict[float, Tensor] = {}
    late = gradients
    if early is not None:
        late, seen = early.rest(gradients, table.positions), None
    for order in request.unit_orders:
        norms[order] = of(late, order, "gradients of units")
        if early is not None:
            early.insert_units(norms[order], order)
    sizes = {order: of(weighted, order, "weights of units") for order in request.deciding_orders}
    return LocalUnits(norms, sizes, missing)


def piece_norms(
    plan: Plan,
    norms: Tensor,
    units: Segments,
    positions: Tensor,
    tables: Tables,
    order: float,
) -> Tensor:
    """Norms of the pieces at ``positions`` from those of their units; 0 where not counted."""
    whole = measuring.segment_norms(norms, units.lengths, units.counts, order, tables)
    if plan.shares is None:
        return whole
    return torch.where(plan.shares[positions] > 0, whole, 0.0)
