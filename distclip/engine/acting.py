"""Changing local gradients as one pass has decided."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from distclip.engine.ledger import Ledger, Round
from distclip.engine.program import Program
from distclip.kernels import changing
from distclip.kernels.measuring import Look
from distclip.kernels.transfer import to_device
from distclip.layouts import sparse

_shape = operator.attrgetter("shape")


@dataclass
class Acting:
    """What one pass has decided, to be done to gradients.

    Attributes:
        program: the compiled policy.
        units: float64 ``(whole.size,)``, what this rank decided on units that lie whole on it; None
            where all are 1.
        kept: bool ``(pieces,)``, those that the clamp at the head of the pass leaves as they are;
            None where nothing is known.
        ledger: what was decided on all ranks.
        skip: 0-dim bool: change nothing.
        dropped: bool ``(parameters,)``: these gradients become 0.
    """

    program: Program
    units: Tensor | None
    kept: npt.NDArray[np.bool_] | None
    ledger: Ledger
    skip: Tensor
    dropped: Tensor | None

    def is_idle(self) -> bool:
        """Whether it is known, without waiting for a device, that nothing is to be done."""
        if self.program.plan.device.type != "cpu":
            return False
        if self.skip is not self.program.no_skip and bool(self.skip):
            return True
        return self.units is None and self.ledger.is_idle(clamps=self._clamps())

    def factor(self) -> float | Tensor | None:
        """The number, or 0-dim tensor, that multiplies everything; None if there is no single one.

        Where there are other ranks, it goes by what all of them know. Else one rank would multiply
        its copy of a gradient while the optimizer of another, which rounds otherwise, does.
        """
        if self.is_idle():
            return 1.0
        if not self._is_uniform() or not self._is_uniform_everywhere():
            return None
        coefficient = cast(Tensor, self.ledger.rounds[0].coefficients)
        if self.program.plan.device.type == "cpu":
            return coefficient.item()
        return torch.where(self.skip, 1.0, coefficient)

    def drop(self, present: Sequence[tuple[int, Tensor]]) -> None:
        """Set the gradients of the dropped parameters to 0, unless the step is skipped."""
        on_host = self.program.plan.device.type == "cpu"
        if self.dropped is None or (on_host and bool(self.skip)):
            return
        dropped = self.dropped[self._rows(present)]
        if self.skip is not self.program.no_skip:
            dropped = dropped & ~self.skip
        changing.zero_([gradient for _, gradient in present], dropped)

    def __call__(
        self,
        present: Sequence[tuple[int, Tensor]],
        loss_scale: Tensor | None = None,
        seen: Look | None = None,
    ) -> None:
        """Change local gradients as the ledger says. Ask :meth:`is_idle` before.

        Args:
            present: ``(position of the piece in the plan, its gradient)``, of any pieces.
            loss_scale: 0-dim; these gradients are this many times too large.
            seen: what a look at just these gradients has found.
        """
        ledger, skip = self.ledger, self.skip
        plan = self.program.plan
        on_host = plan.device.type == "cpu"
        if self._is_uniform():
            tensors = [gradient for _, gradient in present]
            changing.scale_(tensors, self._common().expand(len(tensors)))
            return
        for number, turn in enumerate(ledger.rounds):
            sure = on_host or skip is self.program.no_skip
            if turn.bounds and (number > 0 or self._clamps()):
                self._clamp(number, present, loss_scale, None if sure else skip, seen)
            units = self._unit_factors(number, turn)
            whole: Sequence[tuple[int, Tensor]] = present
            seen_whole = seen
            if units is not None:
                numbers = ledger.table.numbers
                whole = [each for each in present if each[0] not in numbers]
                seen_whole = ledger.table.seen_apart(seen)
                self._scale_units(present, units, seen)
            if turn.coefficients is not None and whole:
                factors = self._unless_skipped(turn.coefficients).expand_as(ledger.ones)
                tensors, tables = [gradient for _, gradient in whole], self.program.scratch.tables
                factors = factors[self._rows(whole)]
                changing.scale_(tensors, factors, seen=seen_whole, tables=tables, what="whole")

    def on(
        self, gradients: Sequence[Tensor | None], seen: Look | None, loss_scale: Tensor | None
    ) -> None:
        """Change the gradients that were measured, those of all pieces."""
        if seen is not None and self._is_uniform():
            changing.scale_all_(seen, self._common(), tables=self.program.scratch.tables)
        else:
            present = [(place, each) for place, each in enumerate(gradients) if each is not None]
            self(present, loss_scale, seen)

    def _clamps(self) -> bool:
        """Whether the clamp at the head of the pass may change anything on this rank."""
        return self.kept is None or not bool(self.kept.all())

    def _is_uniform(self) -> bool:
        uniform = self.dropped is None and self.units is None
        return uniform and self.ledger.is_uniform(clamps=self._clamps())

    def _is_uniform_everywhere(self) -> bool:
        """Whether every rank is uniform: else a clamp may change something, or units be scaled."""
        if self.program.plan.group is None:
            return True
        return not self.ledger.one.local_units and self.ledger.is_uniform(clamps=True)

    def _common(self) -> Tensor:
        return self._unless_skipped(cast(Tensor, self.ledger.rounds[0].coefficients))

    def _unless_skipped(self, factors: Tensor) -> Tensor:
        """``factors``, or 1 where the step is skipped (on the host that has returned before)."""
        if self.program.plan.device.type == "cpu" or self.skip is self.program.no_skip:
            return factors
        return torch.where(self.skip, 1.0, factors)

    def _unit_factors(self, number: int, turn: Round) -> Tensor | None:
        """What the units on this rank are multiplied by; None where whole tensors are.

        float64 ``(local.size,)`` of the pass's :class:`UnitTable`.
        """
        table, local = self.ledger.table, self.ledger.table.local
        factors = self.units if number == 0 else None
        if factors is None and turn.units is None:
            return None
        if factors is None or table.whole is not local:
            ones = self.ledger.ones.new_ones(local.size)
            factors = ones if factors is None else torch.cat([factors, ones[table.whole.size :]])
            if turn.units is not None:
                factors[table.whole.size :] = turn.units[table.places]
        if turn.coefficients is not None:
            each = turn.coefficients.expand_as(self.ledger.ones)[table.parameters]
            if each.device.type != "cpu" or not bool((each == 1.0).all()):
                factors = factors * local.spread(each)
        if self.dropped is not None:
            dropped = local.spread(self.dropped[table.parameters])
            factors = torch.where(dropped, 1.0, factors)
        return self._unless_skipped(factors)

    def _scale_units(
        self, present: Sequence[tuple[int, Tensor]], factors: Tensor, seen: Look | None
    ) -> None:
        """Multiply units of pieces by their factors, out of those of all units on this rank."""
        plan, table = self.program.plan, self.ledger.table
        counts, dims, shapes = table.local.counts, table.dims, table.shapes
        if [position for position, _ in present] == list(range(len(plan.pieces))):
            numbers: Sequence[int] = range(len(table.positions))
            gradients = table.of([gradient for _, gradient in present])
            seen = table.seen(seen)
        else:
            seen = None
            some = {table.numbers[p]: g for p, g in present if p in table.numbers}
            numbers, gradients = list(some), list(some.values())
            factors = factors[table.units_of(numbers)]
            counts, dims = [counts[n] for n in numbers], [dims[n] for n in numbers]
            shapes = [shapes[n] for n in numbers]
        if list(map(_shape, gradients)) != shapes:  # the values of what is sparse
            seen = None
            pieces = [plan.pieces[table.positions[n]] for n in numbers]
            spread = list(map(sparse.spread, pieces, gradients, torch.split(factors, counts), dims))
            factors = torch.cat([each for each, _ in spread])
            counts, dims = [len(each) for each, _ in spread], [where for _, where in spread]
        tables = self.program.scratch.tables
        changing.scale_units_(gradients, factors, dims, counts, tables=tables, seen=seen)

    def _clamp(
        self,
        number: int,
        present: Sequence[tuple[int, Tensor]],
        loss_scale: Tensor | None,
        skip: Tensor | None,
        seen: Look | None,
    ) -> None:
        """Clamp to the bounds of one round."""
        bounds = self._bounds(number, present)
        if loss_scale is not None:
            if isinstance(bounds, np.ndarray):
                with np.errstate(over="ignore"):  # a bound of inf clamps nothing
                    bounds = bounds * float(loss_scale)
            else:
                bounds = [bound * loss_scale.double() for bound in bounds]
        if skip is not None:
            bounds = [torch.where(skip, math.inf, bound) for bound in bounds]
        tables = self.program.scratch.tables
        changing.clamp_([gradient for _, gradient in present], bounds, seen=seen, tables=tables)

    def _bounds(
        self, number: int, present: Sequence[tuple[int, Tensor]]
    ) -> list[float | Tensor] | npt.NDArray[np.float64]:
        """The bound of each gradient in one round; inf for none."""
        plan, turn = self.program.plan, self.ledger.rounds[number]
        found = self.ledger.one.survey.bounds
        if number > 0 or found is None or plan.device.type != "cpu":
            indices = [plan.pieces[position].index for position, _ in present]
            several = [turn.bounds.get(index, math.inf) for index in indices]
            return several if plan.device.type != "cpu" else np.array(several, np.float64)
        if self.kept is not None:
            found = np.where(self.kept, math.inf, found)
        if len(present) < len(plan.pieces):
            found = found[[position for position, _ in present]]
        return found

    def _rows(self, present: Sequence[tuple[int, Tensor]]) -> Tensor:
        plan = self.program.plan
        rows = [plan.pieces[position].index for position, _ in present]
        return to_device(rows, plan.device)
