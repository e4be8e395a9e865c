"""Units of parameters: where they lie on this rank and in the vector of all of them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from distclip.kernels.powers import needs_scaling, scale_of
from distclip.kernels.transfer import to_device
from distclip.layouts.piece import Piece
from distclip.layouts.plan import Plan
from distclip.statistics.request import Request


class LocalPlaces(NamedTuple):
    """The pieces that this rank measures per unit.

    Their places in the plan, the dims that index their units, how many units each has, and whether
    those lie whole on this rank and are decided here.
    """

    positions: list[int]
    dims: list[tuple[int, ...]]
    counts: list[int]
    decided: list[bool]

    @classmethod
    def of(cls, plan: Plan, request: Request) -> LocalPlaces:
        """The pieces of units that are summed count once, those decided here on every rank."""
        found = cls([], [], [], [])
        for position, piece in enumerate(plan.pieces):
            dims, decided = (
                request.unit_dims.get(piece.index),
                piece.index in request.decided_locally,
            )
            if dims is not None and (decided or piece.share > 0.0):
                found.positions.append(position)
                found.dims.append(dims)
                found.counts.append(math.prod(piece.box.extents[dim] for dim in dims))
                found.decided.append(decided)
        return found

    def without(self, missing: Sequence[bool], *, always: bool = False) -> LocalPlaces:
        """Those that are not missing.

        Of a unit cut across ranks the weights count anyway: those stay, unless ``always``.
        """
        kept = [
            each
            for each, (lost, decided) in enumerate(zip(missing, self.decided, strict=True))
            if not (lost and (decided or always))
        ]
        if len(kept) == len(missing):
            return self
        return LocalPlaces(
            [self.positions[each] for each in kept],
            [self.dims[each] for each in kept],
            [self.counts[each] for each in kept],
            [self.decided[each] for each in kept],
        )


class UnitTable:
    """Where the units that are summed over ranks lie in one long vector.

    Attributes:
        rows: parameter -> its place in the vector.
        members, lengths: the parameters in that order, int64 tensor, and how many units each has.
        owner: int64 ``(size,)``, the parameter that each unit belongs to.
        local: the pieces on this rank that are measured per unit.
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
        self.local = LocalPlaces.of(plan, request)
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


def combine_segments(norms: Tensor, lengths: Sequence[int] | Tensor, order: float) -> Tensor:
    """p-norms of wholes from the p-norms of their parts.

    Args:
        norms: float64 ``(sum(lengths),)``, the parts of each whole one after another.
        lengths: how many parts each whole has; 0 gives norm 0.
        order: p > 0 or inf.

    Returns:
        float64 ``(len(lengths),)``.
    """
    counts = lengths if isinstance(lengths, Tensor) else to_device(lengths, norms.device)
    largest = torch.segment_reduce(norms, "max", lengths=counts, unsafe=True, initial=0.0)
    if math.isinf(order):
        return largest
    if not needs_scaling(order):
        return sum_segments(norms.pow(order), counts).pow(1.0 / order)
    scale = scale_of(largest)
    powers = scale.repeat_interleave(counts, output_size=len(norms))
    torch.div(norms, powers, out=powers).pow_(order)
    return sum_segments(powers, counts).pow(1.0 / order) * scale


def sum_segments(values: Tensor, lengths: Tensor) -> Tensor:
    """Sums of consecutive float64 ``values``, ``lengths[i]`` (int64) of them each."""
    return torch.segment_reduce(values, "sum", lengths=lengths, unsafe=True, initial=0.0)
