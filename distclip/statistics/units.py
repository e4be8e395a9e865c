"""Units of parameters: where they lie on this rank, and in the vector that ranks sum."""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Mapping, Sequence
from functools import cached_property
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from distclip.kernels.look import Look
from distclip.kernels.measuring import PlanTables
from distclip.kernels.transfer import to_device
from distclip.layouts.piece import Piece
from distclip.layouts.plan import Plan
from distclip.statistics.request import Request

Each = TypeVar("Each")

AT_ONCE = 1 << 15
"""Units whose weights are measured at a time on the host: more would be a good part of the size of
the gradients, and after each reading of so many the next thing is not in the caches any more."""


class Segments:
    """Units of several tensors, one tensor after another in one vector.

    Attributes:
        counts: units of each tensor.
        lengths: the same, int64 on the device.
        size: of the vector.
        tables: of the segments, for the kernels.
    """

    def __init__(self, counts: Sequence[int], device: torch.device) -> None:
        self.counts = list(counts)
        self.size = sum(self.counts)
        self.lengths = to_device(self.counts, device)
        self.tables = PlanTables()

    @cached_property
    def owner(self) -> Tensor:
        """int64 ``(size,)``, the tensor that each unit belongs to."""
        numbers = torch.arange(len(self.counts), device=self.lengths.device)
        return numbers.repeat_interleave(self.lengths, output_size=self.size)

    @cached_property
    def spans(self) -> list[slice]:
        """Where the units of each tensor lie."""
        stops = itertools.accumulate(self.counts)
        return [slice(stop - count, stop) for stop, count in zip(stops, self.counts, strict=True)]

    def spread(self, values: Tensor) -> Tensor:
        """``(size,)``: for every unit the value of its tensor, from ``(tensors,)``."""
        return values.repeat_interleave(self.lengths, output_size=self.size)

    def count(self, flags: Tensor) -> Tensor:
        """How many units of each tensor are flagged, float64 ``(tensors,)``."""
        if flags.device.type != "cpu":
            return torch.segment_reduce(
                flags.double(), "sum", lengths=self.lengths, unsafe=True, initial=0.0
            )
        raised = flags.numpy()
        found = [float(np.count_nonzero(raised[span])) for span in self.spans]
        return torch.tensor(found, dtype=torch.float64, device="cpu")


class UnitPart(NamedTuple):
    """Neighbouring local pieces that the same policies decide on, and at one time.

    Attributes:
        key: stands for the policies.
        numbers: of the pieces, among the local ones.
        units: where their units lie among the local ones.
        segments: these units.
    """

    key: Hashable
    numbers: slice
    units: slice
    segments: Segments


class UnitTable:
    """Where the units of one pass lie: those on this rank, and those that are summed over ranks.

    Args:
        plan: the pieces.
        request: what is measured of them.
        deciding: parameter -> what stands for the policies that decide on its units on this rank,
            before the reduction.

    Attributes:
        positions: the local pieces that are measured per unit: first those that are decided here,
            in runs of the same policies.
        apart: the other pieces, which are measured as a whole.
        dims: of each, those that index its units.
        shapes, trainable: of each.
        uncounted: numbers of those whose units are counted on another rank, and not decided here.
        local: the units of these pieces, in this order.
        parts: of the pieces that are decided here.
        decided: how many pieces are decided here.
        whole: the units of those.
        index: int64, ``positions``; ``parameters``: the row of each in the plan's table.
        members, summed: the parameters whose units are summed over ranks, and the units.
        rows: parameter -> where its units lie among the summed ones.
        owner: int64 ``(summed.size,)``, the parameter of each summed unit.
    """

    def __init__(
        self, plan: Plan, request: Request, deciding: Mapping[int, Hashable] | None = None
    ) -> None:
        deciding = {} if deciding is None else deciding
        device = plan.device
        order: dict[Hashable, list[int]] = {}
        rest: list[int] = []
        for position, piece in enumerate(plan.pieces):
            if piece.index in request.decided_locally:
                order.setdefault(deciding.get(piece.index), []).append(position)
            elif piece.index in request.unit_dims:
                rest.append(position)
        first = list(itertools.chain(*order.values()))
        self.positions = [*first, *rest]
        pieces = [plan.pieces[position] for position in self.positions]
        self.dims = [request.unit_dims[piece.index] for piece in pieces]
        self.trainable = [piece.trainable for piece in pieces]
        self.uncounted = frozenset(
            number
            for number, piece in enumerate(pieces)
            if piece.share == 0.0 and number >= len(first)
        )
        self._pieces = len(plan.pieces)
        self._all = tuple(self.positions)
        self._everything = self.positions == list(range(len(plan.pieces)))
        self.apart = tuple(sorted(set(range(len(plan.pieces))).difference(self.positions)))
        self.shapes = [piece.box.extents for piece in pieces]
        counts = [
            math.prod(piece.box.extents[dim] for dim in dims)
            for piece, dims in zip(pieces, self.dims, strict=True)
        ]
        self.local = Segments(counts, device)
        self.decided = len(first)
        self.whole = Segments(counts[: self.decided], device) if rest else self.local
        self.parts: list[UnitPart] = []
        done = 0
        for key, members in order.items():
            self._divide(key, done, done + len(members), device)
            done += len(members)
        self.index = to_device(self.positions, device)
        self.parameters = to_device([piece.index for piece in pieces], device)
        self._set_summed(plan, request)
        self._set_places(pieces[self.decided :], plan, request)

    def _divide(self, key: Hashable, first: int, stop: int, device: torch.device) -> None:
        """Make parts of the pieces from ``first`` to ``stop``: as large as can be on a device."""
        counts = self.local.counts
        start, begin = first, sum(counts[:first])
        while start < stop:
            end, units = start, 0
            while end < stop and (
                not units or device.type != "cpu" or units + counts[end] <= AT_ONCE
            ):
                units += counts[end]
                end += 1
            if units:
                segments = Segments(counts[start:end], device)
                numbers, span = slice(start, end), slice(begin, begin + units)
                self.parts.append(UnitPart(key, numbers, span, segments))
            start, begin = end, begin + units

    def _set_summed(self, plan: Plan, request: Request) -> None:
        members = [row for row in request.unit_dims if row not in request.decided_locally]
        counts = [
            math.prod(plan.entries[row].shape[dim] for dim in request.unit_dims[row])
            for row in members
        ]
        self.summed = Segments(counts, plan.device)
        self.rows = dict(zip(members, self.summed.spans, strict=True))
        self.members = to_device(members, plan.device)
        self.owner = self.summed.spread(self.members)

    def _set_places(self, cut: Sequence[Piece], plan: Plan, request: Request) -> None:
        """Where those local units that are summed lie in the vector, and how they count."""
        found = [np.zeros(0, np.int64)]
        for piece in cut:
            index = np.array(self.rows[piece.index].start)
            dims = request.unit_dims[piece.index]
            stride = math.prod(plan.entries[piece.index].shape[dim] for dim in dims)
            for dim in dims:
                stride //= max(1, plan.entries[piece.index].shape[dim])
                offset, extent = piece.box.offsets[dim], piece.box.extents[dim]
                index = index[..., None] + np.arange(offset, offset + extent) * stride
            found.append(index.reshape(-1))
        self.places = to_device(np.concatenate(found), plan.device)
        self.shares: Tensor | None = None
        if any(piece.share != 1.0 for piece in cut):
            shares = torch.tensor([piece.share for piece in cut], dtype=torch.float64, device="cpu")
            counts = torch.tensor(self.local.counts[self.decided :], device="cpu")
            self.shares = shares.repeat_interleave(counts).to(plan.device)

    def of(self, values: Sequence[Each]) -> Sequence[Each]:
        """The values of :attr:`positions`, from one value for each piece of the plan."""
        return values if self._everything else [values[each] for each in self.positions]

    def seen(self, look: Look | None, numbers: slice = slice(None)) -> Look | None:
        """What a look at tensors of all pieces of the plan has found of some of these.

        None where there is no such look, or it is not one at all pieces.
        """
        return self._at(look, self._all[numbers])

    def seen_apart(self, look: Look | None) -> Look | None:
        """As :meth:`seen`, of the pieces that are measured as a whole."""
        return self._at(look, self.apart)

    def _at(self, look: Look | None, positions: tuple[int, ...]) -> Look | None:
        return None if look is None or len(look.tensors) < self._pieces else look.at(positions)

    @cached_property
    def numbers(self) -> dict[int, int]:
        """Position of a piece -> its number in :attr:`positions`."""
        return {position: number for number, position in enumerate(self.positions)}

    def units_of(self, numbers: Sequence[int]) -> Tensor:
        """Where the units of some of the pieces lie, int64 on the device."""
        spans = [self.local.spans[number] for number in numbers]
        parts = [np.arange(span.start, span.stop) for span in spans]
        return to_device(np.concatenate([np.zeros(0, np.int64), *parts]), self.index.device)
