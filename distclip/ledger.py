"""The books of one walk: the compiled program, and what the stages so far have decided.

Norm algebra lives here: after a scaling by c every norm is c times what it was, so the books are
kept without another look at the gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from distclip.layouts.plan import Plan
from distclip.passes import Pass
from distclip.policies import ParameterInfo, Scale, Skip, State, Statistics, UnitPolicy
from distclip.policies._compose import Stage
from distclip.statistics.measurement import Memory, UnitTable, combine_segments
from distclip.statistics.packing import Measurement

Apply = Callable[[Sequence[tuple[int, Tensor]], Tensor | None], None]

States = dict[str, State]
"""State of each stage that has one, by the stage's path."""


@dataclass(frozen=True)
class Program:
    """A policy compiled for a plan."""

    plan: Plan
    parameters: tuple[ParameterInfo, ...]
    passes: tuple[Pass, ...]
    tables: tuple[UnitTable, ...]
    shown: float
    """Order of the norms in the report."""
    unit_counts: tuple[Tensor, ...]
    """Per pass, float64 ``(parameters,)``: how many units each has; 1 where it is one."""
    memory: Memory = field(default_factory=Memory)

    @cached_property
    def ones(self) -> Tensor:
        """float64 ``(parameters,)``; shared by all steps, so never changed in place."""
        return torch.ones(len(self.plan.entries), dtype=torch.float64, device=self.plan.device)

    @cached_property
    def nothing(self) -> Walked:
        """Nothing found and nothing done; its tensors are shared by all steps too."""
        unknown = torch.full_like(self.ones, math.nan)
        return Walked(
            raw=unknown,
            after=unknown,
            coefficients=self.ones,
            smallest=self.ones,
            clipped=torch.zeros_like(unknown),
            threshold=unknown.new_tensor(math.nan),
            skipped=torch.zeros((), dtype=torch.bool, device=self.plan.device),
            nonfinite=torch.zeros_like(unknown, dtype=torch.bool),
            states={},
        )

    @classmethod
    def of(
        cls,
        plan: Plan,
        parameters: Sequence[ParameterInfo],
        passes: Sequence[Pass],
        shown: float,
    ) -> Program:
        """Build, with the tables of units that the passes need."""
        tables = tuple(UnitTable(plan, one.request) for one in passes)
        counts = []
        for one in passes:
            dims = one.request.unit_dims
            units = [
                math.prod(entry.shape[dim] for dim in dims.get(row, ()))
                for row, entry in enumerate(plan.entries)
            ]
            counts.append(torch.tensor(units, dtype=torch.float64, device=plan.device).clamp(min=1))
        return cls(
            plan,
            tuple(parameters),
            tuple(passes),
            tables,
            shown,
            tuple(counts),
        )


@dataclass
class Round:
    """A clamp, then a scaling, of the local gradients."""

    bounds: dict[int, float] = field(default_factory=dict)
    coefficients: Tensor | None = None
    units: Tensor | None = None


class Ledger:
    """The running statistics of one pass: what the gradients are after the stages so far."""

    def __init__(self, program: Program, number: int, measurement: Measurement) -> None:
        self.program = program
        self.number = number
        self.one = program.passes[number]
        self.table = program.tables[number]
        self.measurement = measurement
        self.norms = {order: norms.clone() for order, norms in measurement.norms.items()}
        self.units = {order: units.clone() for order, units in measurement.units.items()}
        self.ones = program.ones
        self.total = self.ones.clone()
        self.scaled = self.ones.clone()
        self.unit_total = torch.ones_like(measurement.unit_weights)
        self.rounds = [Round(bounds=dict(self.one.request.bounds))]
        self.threshold: Tensor | None = None
        self.skip = program.nothing.skipped
        if program.shown in self.norms and self.one.local_units:
            self._book(measurement.clamped[program.shown], list(self.one.local_units))

    def forget(self, members: Tensor) -> None:
        """Set the norms of the flagged parameters to 0: their gradients are dropped."""
        self.norms = {p: torch.where(members, 0.0, norms) for p, norms in self.norms.items()}
        self.total = torch.where(members, 1.0, self.total)
        if self.table.size:
            dropped = members[self.table.owner]
            self.units = {p: torch.where(dropped, 0.0, units) for p, units in self.units.items()}

    def run(self, position: int, stage: Stage, state: State) -> State:
        """Let one stage decide, and book its actions. Returns its new state."""
        policy = stage.policy
        if policy.bound is not None:
            self._clamp(self.one.late_clamps[position], policy.bound)
            return state
        if isinstance(policy, UnitPolicy):
            self._run_units(stage, policy)
            return state
        where = self._where(stage.members)
        statistics = Statistics(
            self._infos(stage.members),
            {p: self.norms[p][where] for p in policy.needs.gradient_norms},
            {p: self.measurement.weights[p][where] for p in policy.needs.weight_norms},
        )
        actions, state = policy.update(statistics, state)
        for action in actions:
            if isinstance(action, Scale):
                self._scale(where, action.coefficients)
                self._show(action.threshold)
            elif isinstance(action, Skip):
                self.skip = self.skip | action.flag
            else:
                raise TypeError(
                    f"{policy!r} returned {action!r} but its `bound` is None: declare the bound, "
                    f"so that the passes are known before the step"
                )
        return state

    def smallest(self) -> Tensor:
        """Per parameter, the smallest coefficient that is applied to any of its units."""
        smallest = self.total.clone()
        if self.table.size:
            smallest.scatter_reduce_(0, self.table.owner, self.unit_total, "amin")
        if self.one.local_units:
            # Known over all parameters together: what was decided locally is not sent one by one.
            where = self._where(list(self.one.local_units))
            later = self.rounds[0].coefficients
            factor = self.ones if later is None else later
            smallest[where] = self.measurement.smallest * factor[where]
        return smallest

    def clipped(self) -> Tensor:
        """Per parameter, the share of its units that are scaled or clamped, float64."""
        share = (self.scaled < 1.0).double()
        shown = self.program.shown
        if self.one.request.bounds and shown in self.norms:
            clamped = self.measurement.clamped[shown] < self.measurement.raw[shown]
            share = torch.maximum(share, clamped.double())
        if self.one.request.unit_dims:
            counts = self.measurement.clipped
            if self.table.size:
                changed = (self.unit_total < 1.0).double()
                counts = counts.index_add(0, self.table.owner, changed)
            share = torch.maximum(share, counts / self.program.unit_counts[self.number])
        return share

    def is_idle(self) -> bool:
        """Whether nothing is to be done to any gradient. Reads the host."""
        return all(
            not turn.bounds
            and (turn.units is None or bool((turn.units == 1.0).all()))
            and (turn.coefficients is None or bool((turn.coefficients == 1.0).all()))
            for turn in self.rounds
        )

    def _infos(self, members: Sequence[int]) -> Sequence[ParameterInfo]:
        everything = self.program.parameters
        if len(members) == len(everything):
            return everything
        return [everything[member] for member in members]

    def _where(self, members: Sequence[int]) -> Tensor | slice:
        if len(members) == len(self.program.parameters):
            return slice(None)
        return torch.tensor(members, dtype=torch.long, device=self.program.plan.device)

    def _show(self, threshold: Tensor | float | None) -> None:
        if threshold is not None and self.threshold is None:
            self.threshold = torch.as_tensor(
                threshold, dtype=torch.float64, device=self.program.plan.device
            )

    def _clamp(self, late: Sequence[int], bound: float) -> None:
        """Clamps at the head of the pass are booked and measured already; these are the others."""
        self._show(bound)
        if not late:
            return
        self.rounds.append(Round(bounds=dict.fromkeys(late, bound)))
        where = self._where(late)
        for norms in self.norms.values():
            # Unknown until measured again, except where no element can exceed the bound.
            known = norms[where]
            norms[where] = torch.where(known <= bound, known, math.nan)

    def _scale(self, where: Tensor | slice, coefficients: Tensor) -> None:
        factors = self.ones.clone()
        factors[where] = coefficients
        self.total = self.total * factors
        self.scaled = self.scaled * factors
        for norms in self.norms.values():
            norms *= factors
        if self.table.size:
            per_unit = factors[self.table.owner]
            self.unit_total = self.unit_total * per_unit
            for units in self.units.values():
                units *= per_unit
        pending = self.rounds[-1]
        pending.coefficients = (
            factors if pending.coefficients is None else pending.coefficients * factors
        )

    def _run_units(self, stage: Stage, policy: UnitPolicy) -> None:
        self._show(policy.threshold)
        whole = [m for m in stage.members if m not in self.one.request.unit_dims]
        if whole:
            where = self._where(whole)
            norms, weights = self.norms[2.0][where], self.measurement.weights[2.0][where]
            self._scale(where, policy.unit_coefficients(norms, weights))
        members = [m for m in stage.members if m in self.table.rows]
        if not members or not self.table.size:  # parameters of shape (0, n) have no units
            return
        norms, weights = self.units[2.0], self.measurement.unit_weights
        factors = policy.unit_coefficients(norms, weights)
        if len(members) < len(self.table.rows):
            chosen = torch.zeros_like(self.ones, dtype=torch.bool)
            chosen[self._where(members)] = True
            factors = torch.where(chosen[self.table.owner], factors, 1.0)
        self.unit_total = self.unit_total * factors
        for units in self.units.values():
            units *= factors
        before = self.norms.get(self.program.shown)
        before = None if before is None else before.clone()
        for order, running in self.norms.items():
            running[self.table.members] = combine_segments(
                self.units[order], self.table.lengths, order
            )
        if before is not None:
            self._book(before, members)
        pending = self.rounds[-1]
        pending.units = factors if pending.units is None else pending.units * factors

    def _book(self, before: Tensor, members: Sequence[int]) -> None:
        """A parameter's coefficient, where its units have different ones: the norms' ratio."""
        where = self._where(members)
        ratio = self.norms[self.program.shown][where] / before[where]
        self.total[where] *= torch.where(before[where] > 0, ratio, 1.0)


@dataclass
class Walked:
    """What one walk found and did. All tensors on the plan's device.

    Attributes:
        raw, after: float64 ``(parameters,)`` norms before and after, NaN where not known.
        coefficients: float64 ``(parameters,)``, what each gradient was multiplied by.
        smallest: float64 ``(parameters,)``, the smallest coefficient applied to a unit of it.
        clipped: float64 ``(parameters,)``, share of its units that were changed.
        threshold: 0-dim float64, NaN where the policy has no single one.
        skipped: 0-dim bool.
        nonfinite: bool ``(parameters,)``.
        states: the new state of every stage.
        apply: under ``later``, what is still to be done: called with ``(position, gradient)`` pairs
            and the loss scale that those gradients carry, for any pieces at a time.
    """

    raw: Tensor
    after: Tensor
    coefficients: Tensor
    smallest: Tensor
    clipped: Tensor
    threshold: Tensor
    skipped: Tensor
    nonfinite: Tensor
    states: States
    apply: Apply | None = None

    @classmethod
    def start(cls, program: Program, states: States) -> Walked:
        """Nothing found and nothing done yet."""
        return replace(program.nothing, states=dict(states))

    def absorb(self, ledger: Ledger) -> None:
        """Add what one pass decided."""
        self.after = ledger.norms.get(ledger.program.shown, self.after)
        self.coefficients = self.coefficients * ledger.total
        self.smallest = self.smallest * ledger.smallest()
        self.clipped = torch.maximum(self.clipped, ledger.clipped())
        if ledger.threshold is not None:
            self.threshold = torch.where(
                torch.isnan(self.threshold), ledger.threshold, self.threshold
            )
        self.skipped = self.skipped | ledger.skip
