"""The running norms and coefficients of one pass, after the stages so far.

Norm algebra: after a scaling by c every norm is c times what it was, so they are
updated without reading a gradient again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor

from distclip.engine.passes import Pass
from distclip.engine.program import Program
from distclip.engine.units import decide
from distclip.kernels import plain
from distclip.kernels.bounds import bounds_held
from distclip.kernels.transfer import to_device
from distclip.policies import (
    ClampingPolicy,
    ParameterInfo,
    Scale,
    ScalingPolicy,
    State,
    Statistics,
    UnitPolicy,
)
from distclip.policies.compose import Stage
from distclip.policies.decide import actions_of, bound_of
from distclip.statistics.packing import Measurement


def _is_one(coefficients: Tensor) -> bool:
    if coefficients.dim() == 0:
        return coefficients.item() == 1.0
    return bool((coefficients == 1.0).all())


@dataclass
class Round:
    """A clamp, then a scaling, of the local gradients.

    ``bounds``: parameter -> its bound, a number or 0-dim on the device.
    ``coefficients``: ``(parameters,)``, or 0-dim where one serves all.
    """

    bounds: Mapping[int, float | Tensor] = field(default_factory=dict)
    coefficients: Tensor | None = None
    units: Tensor | None = None


class Ledger:
    """The running statistics of one pass: what the gradients are after the stages so far."""

    def __init__(self, program: Program, one: Pass, measurement: Measurement) -> None:
        self.program, self.one, self.measurement = program, one, measurement
        self.table = one.survey.table
        # No tensor in these books is changed in place: most are shared, and all are replaced.
        self._norms: Mapping[float, Tensor] = measurement.norms
        self.units = dict(measurement.units)
        self.ones = self._total = self._scaled = program.ones
        self._common: Tensor | None = None
        """0-dim: a coefficient of all parameters that the other fields do not contain yet."""
        summed = self.table.summed.size
        self.unit_total = self.ones.new_ones(summed) if summed else None
        self.rounds = [Round(bounds=one.survey.request.bounds)]
        self.threshold: Tensor | float | None = None
        self.late_clamped = program.all_finite
        """Bool ``(parameters,)``: those clamped after the measuring, where the norms show it."""
        self.asked: dict[str, Tensor] = {}
        """Stage path -> its flag, of the stages that ask for a skip."""
        before = measurement.clamped.get(program.shown)
        if one.local_units and before is not None and self._norms[program.shown] is not before:
            self._book(before, list(one.local_units))

    @property
    def norms(self) -> Mapping[float, Tensor]:
        """Order -> float64 ``(parameters,)`` norms after the stages so far."""
        if self._common is None:
            return self._norms
        return {order: norms * self._common for order, norms in self._norms.items()}

    @property
    def total(self) -> Tensor:
        """float64 ``(parameters,)``, what each gradient is multiplied by."""
        return self._total if self._common is None else self._total * self._common

    @property
    def scaled(self) -> Tensor:
        """As :attr:`total`, without the coefficients that are decided per unit."""
        return self._scaled if self._common is None else self._scaled * self._common

    def _settle(self) -> None:
        """Enter the coefficient of all, before an entry that is not of all."""
        if self._common is not None:
            factors, self._common = self._common, None
            self._multiply(factors)

    def forget(self, members: Tensor) -> None:
        """Set the norms of the flagged parameters to 0: their gradients are dropped."""
        self._settle()
        self._norms = {p: torch.where(members, 0.0, norms) for p, norms in self._norms.items()}
        self._total = torch.where(members, 1.0, self._total)
        if self.table.summed.size:
            dropped = members[self.table.owner]
            self.units = {p: torch.where(dropped, 0.0, units) for p, units in self.units.items()}

    def run(self, position: int, stage: Stage, state: State) -> State:
        """Let one stage decide, and record its actions. Returns its new state."""
        policy, one = stage.policy, self.one
        if position in one.whole:
            self._run_units(position, cast(UnitPolicy, policy))
            return state
        if position in one.late_clamps:
            clamping = cast(ClampingPolicy, policy)
            if not clamping.moving:
                self._clamp(one.late_clamps[position], clamping.bound)
                return state
            statistics = self._statistics(stage)
            bound, state = bound_of(clamping, statistics, state)
            self._clamp(one.late_clamps[position], bound)
            return state
        where = self._where(stage.members)
        statistics = self._statistics(stage)
        actions, state = actions_of(cast(ScalingPolicy, policy), statistics, state)
        for action in actions:
            if isinstance(action, Scale):
                self._scale(where, action.coefficients)
                self._show(action.threshold)
            else:
                asked = self.asked.get(stage.path)
                self.asked[stage.path] = action.flag if asked is None else asked | action.flag
        return state

    def _statistics(self, stage: Stage) -> Statistics:
        """The statistics that one stage is given."""
        needs, norms, weights = stage.needs, self.norms, self.measurement.weights
        gradient_norms = {p: norms[p] for p in needs.gradient_norms}
        weight_norms = {p: weights[p] for p in needs.weight_norms} if needs.weight_norms else {}
        in_range = self.total is self.ones and self.measurement.in_range
        loss = self.measurement.loss if needs.loss else None
        infos = self._infos(stage.members)
        if len(infos) < len(self.program.parameters):
            where = self._where(stage.members)
            gradient_norms = {p: each[where] for p, each in gradient_norms.items()}
            weight_norms = {p: each[where] for p, each in weight_norms.items()}
        return Statistics(infos, gradient_norms, weight_norms, in_range, loss)

    def smallest(self) -> Tensor:
        """Per parameter, the smallest coefficient that is applied to any of its units."""
        smallest = self.total.clone()
        if self.unit_total is not None:
            smallest.scatter_reduce_(0, self.table.owner, self.unit_total, "amin")
        if self.one.local_units:
            # Known over all parameters together: what was decided locally is not sent one by one.
            assert self.measurement.smallest is not None
            where = self._where(list(self.one.local_units))
            later = self.rounds[0].coefficients
            factor = self.ones if later is None else later.expand_as(self.ones)
            smallest[where] = self.measurement.smallest * factor[where]
        return smallest

    def clipped(self) -> Tensor:
        """Per parameter, the share of its units that are scaled or clamped, float64."""
        share = (self.scaled < 1.0).double()
        shown = self.program.shown
        if self.one.survey.request.bounds and shown in self.norms:
            clamped = self.measurement.clamped[shown] < self.measurement.raw[shown]
            share = torch.maximum(share, clamped.double())
        share = torch.maximum(share, self.late_clamped.double())
        if self.one.survey.request.unit_dims:
            counts = self.measurement.clipped
            counts = torch.zeros_like(self.ones) if counts is None else counts
            if self.unit_total is not None:
                changed = (self.unit_total < 1.0).double()
                counts = counts.index_add(0, self.table.owner, changed)
            share = torch.maximum(share, counts / self.one.survey.unit_counts)
        return share

    def is_idle(self, *, clamps: bool) -> bool:
        """Whether nothing is to be done to any gradient. Reads the host.

        Args:
            clamps: whether the clamp at the head of the pass may change anything here.
        """
        return all(
            not (turn.bounds and (clamps or number > 0))
            and (turn.units is None or bool((turn.units == 1.0).all()))
            and (turn.coefficients is None or _is_one(turn.coefficients))
            for number, turn in enumerate(self.rounds)
        )

    def is_uniform(self, *, clamps: bool) -> bool:
        """Whether every gradient is multiplied by the same coefficient, and that is all."""
        turn = self.rounds[0]
        return (
            len(self.rounds) == 1
            and not (turn.bounds and clamps)
            and turn.units is None
            and turn.coefficients is not None
            and turn.coefficients.dim() == 0
        )

    def _infos(self, members: Sequence[int]) -> Sequence[ParameterInfo]:
        everything = self.program.parameters
        if len(members) == len(everything):
            return everything
        return [everything[member] for member in members]

    def _where(self, members: Sequence[int]) -> Tensor | slice:
        if len(members) == len(self.program.parameters):
            return slice(None)
        return to_device(members, self.program.plan.device)

    def _show(self, threshold: Tensor | float | None) -> None:
        if self.threshold is None or threshold is None:
            self.threshold = threshold if self.threshold is None else self.threshold
        elif isinstance(self.threshold, Tensor):  # NaN where a stage has none in this step
            self.threshold = torch.where(torch.isnan(self.threshold), threshold, self.threshold)

    def _clamp(self, late: Sequence[int], bound: float | Tensor) -> None:
        """Record a clamp. One at the head of the pass has been recorded, and measured, before."""
        if not isinstance(bound, Tensor) or bound.dim() == 0:
            self._show(bound)
        if not late:
            return
        self._settle()
        where = self._where(late)
        limits = torch.as_tensor(bound, dtype=torch.float64, device=self.ones.device)
        limits = limits.expand(len(late))
        largest = self._norms.get(math.inf)
        bounds: Mapping[int, float | Tensor]
        if not isinstance(bound, Tensor):
            bounds = dict.fromkeys(late, bound)
        elif self.ones.device.type == "cpu":
            bounds = dict(zip(late, limits.tolist(), strict=True))
        else:
            bounds = dict(zip(late, limits.unbind(), strict=True))
        # Norms are capped at what elements are clamped to: the bound as their dtypes hold it.
        names = [self.program.plan.entries[member].dtype for member in late]
        limits = bounds_held(limits, [getattr(torch, name) for name in names])
        if largest is not None:
            exceeds = ~(largest[where] <= limits)
            self.late_clamped = self.late_clamped.clone()
            self.late_clamped[where] = exceeds | self.late_clamped[where]
            if self.ones.device.type == "cpu":
                touched = zip(late, exceeds.tolist(), strict=True)
                bounds = {member: bounds[member] for member, flag in touched if flag}
        if bounds:
            self.rounds.append(Round(bounds=bounds))
        found = {}
        for order, norms in self._norms.items():
            # Unknown until measured again, except where no element can exceed the bound.
            known = norms[where]
            capped = torch.minimum(known, limits) if math.isinf(order) else math.nan
            found[order] = norms.clone()
            found[order][where] = torch.where(known <= limits, known, capped)
        self._norms = found

    def _scale(self, where: Tensor | slice, coefficients: Tensor) -> None:
        if isinstance(where, slice):
            factors = coefficients
        else:
            factors = self.ones.clone()
            factors[where] = coefficients
        if factors.dim() == 0 and self.unit_total is None:
            self._common = factors if self._common is None else self._common * factors
        else:
            self._settle()
            self._multiply(factors)
        pending = self.rounds[-1]
        pending.coefficients = (
            factors if pending.coefficients is None else pending.coefficients * factors
        )

    def _multiply(self, factors: Tensor) -> None:
        same = self._total is self._scaled
        self._total = self._total * factors
        self._scaled = self._total if same else self._scaled * factors
        self._norms = {order: norms * factors for order, norms in self._norms.items()}
        if self.unit_total is not None:
            per_unit = factors if factors.dim() == 0 else factors[self.table.owner]
            self.unit_total = self.unit_total * per_unit
            self.units = {order: units * per_unit for order, units in self.units.items()}

    def _run_units(self, position: int, policy: UnitPolicy) -> None:
        self._show(policy.threshold)
        whole, members = self.one.whole[position], self.one.divided[position]
        if whole:
            where = self._where(whole)
            norms = self.norms[policy.norm_type][where]
            weights = self.measurement.weights[policy.norm_type][where]
            self._scale(where, policy.unit_coefficients(norms, weights))
        if not members or self.unit_total is None:  # parameters of shape (0, n) have no units
            return
        room = torch.empty_like(self.unit_total)
        factors = decide((policy,), self.units, self.measurement.unit_weights, room)
        if len(members) < len(self.table.rows):
            chosen = torch.zeros_like(self.ones, dtype=torch.bool)
            chosen[self._where(members)] = True
            factors = torch.where(chosen[self.table.owner], factors, 1.0)
        self.unit_total = self.unit_total * factors
        self.units = {order: units * factors for order, units in self.units.items()}
        self._settle()
        before = self._norms.get(self.program.shown)
        self._norms = {
            order: running.index_copy(
                0,
                self.table.members,
                plain.segment_norms(self.units[order], self.table.summed.lengths, order),
            )
            for order, running in self._norms.items()
        }
        if before is not None:
            self._book(before, members)
        pending = self.rounds[-1]
        pending.units = factors if pending.units is None else pending.units * factors

    def _book(self, before: Tensor, members: Sequence[int]) -> None:
        """A parameter's coefficient, where its units have different ones: the norms' ratio."""
        where = self._where(members)
        ratio = self._norms[self.program.shown][where] / before[where]
        total = self._total.clone()
        total[where] *= torch.where(before[where] > 0, ratio, 1.0)
        self._total = total
