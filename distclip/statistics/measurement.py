"""One measuring pass: local norms, packed into one all-reduce, unpacked as whole-tensor norms."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from distclip.errors import DistclipError
from distclip.layouts import dtensor
from distclip.layouts.piece import MisplacedError, Piece
from distclip.layouts.plan import Plan
from distclip.statistics import local
from distclip.statistics.neighbours import Neighbours, Together


@dataclass(frozen=True)
class Request:
    """What one pass measures. Indices are rows of the plan's table.

    Attributes:
        orders: orders of the per-parameter gradient norms.
        weight_orders: orders of the per-parameter weight norms.
        weighted: parameters whose weight norms are wanted.
        unit_dims: parameters measured per unit -> the dims that index their units.
        decided_locally: those of them whose units lie whole on a rank and are decided there,
            before the reduction; the others' units are summed over ranks.
        bounds: parameters to measure as if clamped to +-bound.
        raw_orders: orders to measure also without the clamping.
        reduced: whether anything has to be known on all ranks.
        loss: whether the loss is averaged over ranks along with the norms.
    """

    orders: tuple[float, ...]
    weight_orders: tuple[float, ...] = ()
    weighted: frozenset[int] = frozenset()
    unit_dims: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    decided_locally: frozenset[int] = frozenset()
    bounds: Mapping[int, float] = field(default_factory=dict)
    raw_orders: tuple[float, ...] = ()
    reduced: bool = True
    loss: bool = False

    @property
    def unit_orders(self) -> tuple[float, ...]:
        """Orders measured per unit: 2 for the decision, and what is asked of the parameters."""
        return tuple(dict.fromkeys((2.0, *self.orders)))


class UnitTable:
    """Where the units that are summed over ranks lie in one long vector.

    Attributes:
        rows: parameter -> its place in the vector.
        members, lengths: the parameters in that order, int64 tensor, and how many units each has.
        owner: int64 ``(size,)``, the parameter that each unit belongs to.
    """

    def __init__(self, plan: Plan, request: Request) -> None:
        self.rows: dict[int, slice] = {}
        stop = 0
        for row, dims in request.unit_dims.items():
            if row not in request.decided_locally:
                start, stop = stop, stop + math.prod(plan.entries[row].shape[d] for d in dims)
                self.rows[row] = slice(start, stop)
        self.size = stop
        device = plan.device
        self.lengths = [where.stop - where.start for where in self.rows.values()]
        self.members = torch.tensor(list(self.rows), dtype=torch.long, device=device)
        self.owner = self.members.repeat_interleave(
            torch.tensor(self.lengths, dtype=torch.long, device=device)
        )
        self._plan, self._request = plan, request
        self._places: dict[int, slice | Tensor] = {}

    def place(self, position: int) -> slice | Tensor:
        """Where the units of local piece ``position`` lie: a slice, or indices ``(units,)``."""
        if position not in self._places:
            self._places[position] = self._find(self._plan.pieces[position])
        return self._places[position]

    def _find(self, piece: Piece) -> slice | Tensor:
        shape = self._plan.entries[piece.index].shape
        start = self.rows[piece.index].start
        dims = self._request.unit_dims[piece.index]
        if len(dims) == 1:
            first = start + piece.box.offsets[dims[0]]
            return slice(first, first + piece.box.extents[dims[0]])
        index = torch.tensor(start, device=self.owner.device)
        stride = math.prod(shape[dim] for dim in dims)
        for dim in dims:
            stride //= shape[dim]
            offset, extent = piece.box.offsets[dim], piece.box.extents[dim]
            steps = torch.arange(offset, offset + extent, device=self.owner.device) * stride
            index = index.unsqueeze(-1) + steps
        return index.flatten()


@dataclass
class LocalUnits:
    """Unit norms on this rank: those of several pieces one after another.

    Attributes:
        positions: of the pieces, in the plan.
        counts: units of each.
        norms: order -> float64 ``(sum(counts),)`` gradient norms.
        weights: float64 ``(sum(counts),)`` weight 2-norms.
    """

    positions: list[int] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    norms: dict[float, Tensor] = field(default_factory=dict)
    weights: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))

    def spans(self) -> list[tuple[int, slice]]:
        """``(position, where its units lie)`` of every piece."""
        stops = list(itertools.accumulate(self.counts))
        return [
            (position, slice(stop - count, stop))
            for position, count, stop in zip(self.positions, self.counts, stops, strict=True)
        ]


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
        together: those of them that lie side by side in memory and were measured as one.
        misplaced: whether a gradient here has to be redistributed, by all ranks of its mesh.
        loss: float64 ``(2,)``, the sum of the losses given on this rank, and how many those are.
    """

    norms: dict[float, Tensor] = field(default_factory=dict)
    raw: dict[float, Tensor] = field(default_factory=dict)
    weights: dict[float, Tensor] = field(default_factory=dict)
    units: LocalUnits = field(default_factory=lambda: LocalUnits())
    trouble: DistclipError | None = None
    present: list[Tensor | None] = field(default_factory=list)
    together: Together | None = None
    misplaced: bool = False
    loss: Tensor | None = None

    def divide(self, scale: Tensor) -> None:
        """Divide all gradient norms by a 0-dim loss scale."""
        for by_order in (self.norms, self.raw, self.units.norms):
            for order in by_order:
                by_order[order] = by_order[order] / scale


@dataclass(frozen=True)
class Memory:
    """What is remembered from step to step about the places of a plan's tensors in memory."""

    gradients: Neighbours = field(default_factory=Neighbours)
    weights: Neighbours = field(default_factory=Neighbours)
    habits: set[str] = field(default_factory=set)
    """``"misplaced"`` once gradients had to be redistributed; the same on every rank."""


def measure(plan: Plan, request: Request, memory: Memory) -> LocalMeasurement:
    """Measure this rank's pieces. Issues no collective."""
    result = LocalMeasurement()
    quick = None if plan.holds is None else dtensor.quick_gradients(plan.holds, plan.specs)
    result.present = present = _fetched(plan, result) if quick is None else quick
    plain = _counted(plan, request, present)
    if not request.bounds:
        # With the parameters' own specs the gradients have the parameters' shapes and dtypes.
        result.together = memory.gradients.find(plain, shaped=quick is not None)
    everything = result.together is not None and result.together.known.complete
    if quick is not None and not everything and not dtensor.are_strided(quick):
        result.present = present = _fetched(plan, result)  # refuses by name
        plain = _counted(plan, request, present)
    bounds = [request.bounds.get(piece.index) for piece in plan.pieces] if request.bounds else None
    if request.unit_dims:
        result.units = _measure_units(plan, request, present)
    for order in request.orders:
        norms = local.norms(plain, order, bounds, device=plan.device, together=result.together)
        _insert_units(plan, norms, result.units, order)
        result.norms[order] = norms
    if request.bounds:
        _measure_raw(plan, request, result)
    if not request.weight_orders:
        return result
    counted: list[Tensor | None] = [
        piece.weight()
        if piece.index in request.weighted
        and piece.share > 0.0
        and (piece.trainable or present[position] is not None)
        else None
        for position, piece in enumerate(plan.pieces)
    ]
    for order in request.weight_orders:
        result.weights[order] = local.norms(
            counted, order, device=plan.device, together=memory.weights.find(counted)
        )
    return result


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


def _counted(
    plan: Plan, request: Request, present: Sequence[Tensor | None]
) -> Sequence[Tensor | None]:
    """Those that are measured as a whole, and by this rank."""
    if not request.unit_dims and plan.shares is None:
        return present
    return [
        None if piece.share == 0.0 or piece.index in request.unit_dims else gradient
        for piece, gradient in zip(plan.pieces, present, strict=True)
    ]


def _measure_raw(plan: Plan, request: Request, result: LocalMeasurement) -> None:
    """Norms as they are before the clamping: only clamped pieces are read once more."""
    clamped: list[Tensor | None] = [
        gradient if piece.index in request.bounds and piece.share > 0.0 else None
        for piece, gradient in zip(plan.pieces, result.present, strict=True)
    ]
    chosen = torch.tensor(
        [piece.index in request.bounds for piece in plan.pieces], device=plan.device
    )
    for order in request.raw_orders:
        raw = local.norms(clamped, order, device=plan.device)
        result.raw[order] = torch.where(chosen, raw, result.norms[order])


def _measure_units(plan: Plan, request: Request, present: Sequence[Tensor | None]) -> LocalUnits:
    found = LocalUnits()
    weights: list[Tensor | None] = []
    dims: list[tuple[int, ...]] = []
    bounds: list[float | None] = []
    for position, piece in enumerate(plan.pieces):
        unit_dims = request.unit_dims.get(piece.index)
        if unit_dims is None:
            continue
        missing = present[position] is None
        if missing if piece.index in request.decided_locally else piece.share == 0.0:
            continue
        found.positions.append(position)
        found.counts.append(math.prod(piece.box.extents[dim] for dim in unit_dims))
        dims.append(unit_dims)
        bounds.append(request.bounds.get(piece.index))
        # Of a unit cut across ranks the weight counts even where this rank's gradient is missing.
        weights.append(piece.weight() if piece.trainable or not missing else None)
    gradients = [present[position] for position in found.positions]
    for order in request.unit_orders:
        found.norms[order] = local.unit_norms(
            gradients, dims, found.counts, order, bounds, device=plan.device
        )
    found.weights = local.unit_norms(weights, dims, found.counts, 2.0, device=plan.device)
    return found


def _insert_units(plan: Plan, norms: Tensor, units: LocalUnits, order: float) -> None:
    """Write the norms of the pieces that were measured per unit to their places."""
    if not units.positions:
        return
    whole = combine_segments(units.norms[order], units.counts, order)
    where = torch.tensor(units.positions, device=norms.device)
    if plan.shares is not None:
        whole = torch.where(plan.shares[where] > 0, whole, 0.0)
    norms[where] = whole


def combine_segments(norms: Tensor, lengths: Sequence[int], order: float) -> Tensor:
    """p-norms of wholes from the p-norms of their parts.

    Args:
        norms: float64 ``(sum(lengths),)``, the parts of each whole one after another.
        lengths: how many parts each whole has; 0 gives norm 0.
        order: p > 0 or inf.

    Returns:
        float64 ``(len(lengths),)``.
    """
    counts = torch.tensor(lengths, device=norms.device)
    largest = torch.segment_reduce(norms, "max", lengths=counts, unsafe=True, initial=0.0)
    if math.isinf(order):
        return largest
    unit = torch.where((largest > 0) & torch.isfinite(largest), largest, 1.0)
    powers = (norms / unit.repeat_interleave(counts)).pow(order)
    sums = torch.segment_reduce(powers, "sum", lengths=counts, unsafe=True, initial=0.0)
    return sums.pow(1.0 / order) * unit
