"""Clipping by the norm of all gradients together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from distclip.policies.norm_threshold import NormThreshold, joint_coefficient, norm_coefficient
from distclip.policies.protocol import Action, Scale, State, Statistics
from distclip.policies.registry import register


@register
@dataclass(frozen=True)
class GlobalNorm(NormThreshold):
    """Scale all gradients so that their joint p-norm is at most ``max_norm``.

    ``g *= min(1, max_norm / (||g||_p + 1e-6))`` over all parameters together. Pascanu et al. 2013
    (arXiv 1211.5063, algorithm 1), with torch's 1e-6.

    Args:
        max_norm: threshold >= 0; ``math.inf`` measures only.
        norm_type: order p > 0 or inf.

    Raises:
        ConfigurationError: a negative or NaN threshold, p <= 0.
    """

    name: ClassVar[str] = "global_norm"

    def update(self, statistics: Statistics, state: State) -> tuple[Sequence[Action], State]:
        if statistics.in_range:
            total = statistics.total_norm(self.norm_type)
            coefficient = norm_coefficient(total, self.max_norm)
        else:
            norms = statistics.gradient_norms(self.norm_type)
            coefficient = joint_coefficient(norms, self.norm_type, self.max_norm)
        return (Scale(coefficient, self.max_norm),), state


global_norm = GlobalNorm
