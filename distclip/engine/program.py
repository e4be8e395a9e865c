"""A policy compiled for a plan: its passes, their tables of units, and shared constant tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from distclip.engine.passes import Pass
from distclip.layouts.plan import Plan
from distclip.policies import (
    ParameterInfo,
    State,
)
from distclip.statistics.measurement import Memory
from distclip.statistics.overlap import Overlap
from distclip.statistics.packing import LocalDecision
from distclip.statistics.units import UnitTable

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
    parts: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """The parts that the policy tells apart -> their parameters; none where it does not."""

    @cached_property
    def has_units(self) -> bool:
        """Whether any parameter is measured per unit."""
        return any(one.request.unit_dims for one in self.passes)

    @cached_property
    def ones(self) -> Tensor:
        """float64 ``(parameters,)``; shared by all steps, so never changed in place."""
        return torch.ones(len(self.plan.entries), dtype=torch.float64, device=self.plan.device)

    @cached_property
    def unknown(self) -> Tensor:
        """float64 ``(parameters,)`` of NaN; shared too."""
        return torch.full_like(self.ones, math.nan)

    @cached_property
    def all_finite(self) -> Tensor:
        """Bool ``(parameters,)``, no parameter is non-finite; shared too."""
        return torch.zeros_like(self.ones, dtype=torch.bool)

    @cached_property
    def no_skip(self) -> Tensor:
        """0-dim bool tensor, false; shared by all steps, never changed in place."""
        return torch.zeros((), dtype=torch.bool, device=self.plan.device)

    @cached_property
    def nothing_decided(self) -> LocalDecision:
        """What is decided before the reduction where no unit is; shared too."""
        return LocalDecision(None, {}, torch.zeros_like(self.ones), self.ones.new_ones(()))

    @cached_property
    def no_loss(self) -> Tensor:
        """float64 ``(2,)``: no loss was given, whose mean is 0 / 0; shared too."""
        return torch.zeros(2, dtype=torch.float64, device=self.plan.device)

    @classmethod
    def of(
        cls,
        plan: Plan,
        parameters: Sequence[ParameterInfo],
        passes: Sequence[Pass],
        shown: float,
        overlap: Overlap | None = None,
        parts: Mapping[str, tuple[int, ...]] | None = None,
    ) -> Program:
        """Build, with the tables of units that the passes need.

        ``overlap`` measures during backward what the first of them is to measure.
        """
        tables = tuple(UnitTable(plan, one.request, one.local_units) for one in passes)
        counts = []
        for one in passes:
            dims = one.request.unit_dims
            units = [
                math.prod(entry.shape[dim] for dim in dims.get(row, ()))
                for row, entry in enumerate(plan.entries)
            ]
            counts.append(torch.tensor(units, dtype=torch.float64, device=plan.device).clamp(min=1))
        if overlap is not None:
            overlap.expect(passes[0].request, tables[0])
        return cls(
            plan,
            tuple(parameters),
            tuple(passes),
            tables,
            shown,
            tuple(counts),
            Memory(overlap=overlap),
            parts or {},
        )
