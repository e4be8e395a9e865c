"""Measure only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from distclip.policies.checks import NormOrder
from distclip.policies.protocol import Action, Needs, ScalingPolicy, State, Statistics
from distclip.policies.registry import register


@register
@dataclass(frozen=True)
class Measure(ScalingPolicy):
    """Measure every norm, change nothing.

    Args:
        norm_type: order p of the norms in the report; p > 0 or inf.
    """

    norm_type: NormOrder = 2.0
    name: ClassVar[str] = "measure"

    @property
    def needs(self) -> Needs:
        return Needs.of(gradients=[self.norm_type])

    def update(self, statistics: Statistics, state: State) -> tuple[Sequence[Action], State]:
        return (), state


measure = Measure
