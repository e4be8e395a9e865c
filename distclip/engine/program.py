"""A policy compiled for a plan: its passes, and constant tensors that all steps share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from distclip.engine.passes import Pass
from distclip.layouts.plan import Plan
from distclip.policies import ParameterInfo, State
from distclip.statistics.overlap import Overlap
from distclip.statistics.scratch import Scratch

StageStates = dict[str, State]
"""State of each stage that has one, by the stage's path."""


@dataclass(frozen=True)
class Program:
    """A policy compiled for a plan.

    Attributes:
        plan: the parameters, and the pieces of them on this rank.
        parameters: what policies know of them, in the order of the plan's table.
        passes: in order.
        shown: order of the norms in the report.
        overlap: what measures during backward for the first pass.
        parts: the parts that the policy tells apart -> their parameters; none where it does not.
        scratch: what is remembered of the gradients from step to step.
    """

    plan: Plan
    parameters: tuple[ParameterInfo, ...]
    passes: tuple[Pass, ...]
    shown: float
    overlap: Overlap | None = None
    parts: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    scratch: Scratch = field(default_factory=Scratch)

    def __post_init__(self) -> None:
        if self.overlap is not None:
            self.overlap.expect(self.passes[0].survey)

    @cached_property
    def is_simple(self) -> bool:
        """Whether a step measures norms of whole gradients and nothing else, once, on the host.

        What one step is asked for beside its policy may be more.
        """
        return len(self.passes) == 1 and self.passes[0].survey.is_plain and self.overlap is None

    @cached_property
    def has_units(self) -> bool:
        """Whether any parameter is measured per unit."""
        return any(one.survey.request.unit_dims for one in self.passes)

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
    def no_loss(self) -> Tensor:
        """float64 ``(2,)``: no loss was given, whose mean is 0 / 0; shared too."""
        return torch.zeros(2, dtype=torch.float64, device=self.plan.device)
