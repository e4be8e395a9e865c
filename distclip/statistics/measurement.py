"""One measuring pass: local norms, packed into one all-reduce, unpacked as whole-tensor norms."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from distclip.errors import DistclipError
from distclip.layouts.piece import Piece
from distclip.layouts.plan import Plan
from distclip.statistics import local


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
    """

    orders: tuple[float, ...]
    weight_orders: tuple[float, ...] = ()
    weighted: frozenset[int] = frozenset()
    unit_dims: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    decided_locally: frozenset[int] = frozenset()
    bounds: Mapping[int, float] = field(default_factory=dict)
    raw_orders: tuple[float, ...] = ()
    reduced: bool = True

    @property
    def unit_orders(self) -> tuple[float, ...]:
        """Orders measured per unit: 2 for the decision, and what is asked of the parameters."""
        return tuple(dict.fromkeys((2.0, *self.orders)))


class UnitTable:
    """Where the units that are summed over ranks lie in one long vector."""

    def __init__(self, plan: Plan, request: Request) -> None:
        self.rows: dict[int, slice] = {}
        stop = 0
        for row, dims in request.unit_dims.items():
            if row not in request.decided_locally:
                start, stop = stop, stop + math.prod(plan.entries[row].shape[d] for d in dims)
                self.rows[row] = slice(start, stop)
        self.size = stop
        device = plan.device
        self.owner = torch.zeros(stop, dtype=torch.long, device=device)
        for row, where in self.rows.items():
            self.owner[where] = row
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
class LocalMeasurement:
    """What this rank measured. ``position`` is the index of a piece in the plan.

    Attributes:
        norms: order -> ``(pieces,)`` float64, 0 where not measured or not counted.
        raw: the same without the clamping, for ``raw_orders``.
        weights: order -> ``(pieces,)``.
        units: position -> order -> ``(local units,)`` gradient norms.
        unit_weights: position -> ``(local units,)`` weight 2-norms.
        trouble: what went wrong here; every rank has to learn of it before anybody raises.
        present: pieces that have a gradient, with it.
    """

    norms: dict[float, Tensor] = field(default_factory=dict)
    raw: dict[float, Tensor] = field(default_factory=dict)
    weights: dict[float, Tensor] = field(default_factory=dict)
    units: dict[int, dict[float, Tensor]] = field(default_factory=dict)
    unit_weights: dict[int, Tensor] = field(default_factory=dict)
    trouble: DistclipError | None = None
    present: list[Tensor | None] = field(default_factory=list)

    def divide(self, scale: Tensor) -> None:
        """Divide all gradient norms by a 0-dim loss scale."""
        for by_order in (self.norms, self.raw, *self.units.values()):
            for order in by_order:
                by_order[order] = by_order[order] / scale


def measure(plan: Plan, request: Request) -> LocalMeasurement:
    """Measure this rank's pieces. Issues no collective (except to reduce ``Partial`` gradients)."""
    result = LocalMeasurement()
    present = result.present
    for piece in plan.pieces:
        try:
            present.append(piece.gradient())
        except DistclipError as trouble:
            present.append(None)
            result.trouble = result.trouble or trouble
    plain: list[Tensor | None] = list(result.present)
    bounds = [request.bounds.get(piece.index) for piece in plan.pieces] if request.bounds else None
    if request.unit_dims or plan.shares is not None:
        for position, piece in enumerate(plan.pieces):
            if piece.index in request.unit_dims:
                plain[position] = None
                _measure_units(plan, request, position, result)
            elif piece.share == 0.0:
                plain[position] = None
    for order in request.orders:
        norms = local.norms(plain, order, bounds, device=plan.device)
        for position, units in result.units.items():
            if plan.pieces[position].share > 0.0:
                norms[position] = combine(units[order], order)
        result.norms[order] = norms
    if request.bounds:
        _measure_raw(plan, request, result)
    if not request.weight_orders:
        return result
    counted: list[Tensor | None] = [
        piece.weight()
        if piece.index in request.weighted and piece.trainable and piece.share > 0.0
        else None
        for piece in plan.pieces
    ]
    for order in request.weight_orders:
        result.weights[order] = local.norms(counted, order, device=plan.device)
    return result


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


def _measure_units(plan: Plan, request: Request, position: int, result: LocalMeasurement) -> None:
    piece = plan.pieces[position]
    gradient = result.present[position]
    whole = piece.index in request.decided_locally
    if (gradient is None) if whole else (piece.share == 0.0):
        return
    dims, bound = request.unit_dims[piece.index], request.bounds.get(piece.index)
    if gradient is not None:
        result.units[position] = {
            order: local.unit_norms(gradient, dims, order, bound).to(plan.device)
            for order in request.unit_orders
        }
    # Of a unit cut across ranks the weight counts even where this rank's gradient is missing.
    if piece.trainable:
        weight = local.unit_norms(piece.weight(), dims, 2.0)
        result.unit_weights[position] = weight.to(plan.device)


def combine(norms: Tensor, order: float) -> Tensor:
    """p-norm of a whole from the p-norms of its parts; float64 ``(parts,)`` to 0-dim."""
    if norms.numel() == 0:
        return norms.new_zeros(())
    if math.isinf(order):
        return norms.max()
    largest = norms.max()
    unit = torch.where((largest > 0) & torch.isfinite(largest), largest, 1.0)
    whole: Tensor = torch.linalg.vector_norm(norms / unit, order) * unit
    return whole
