"""Clipping each parameter's gradient by its own norm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from distclip.policies.norm_threshold import NormThreshold, norm_coefficient
from distclip.policies.protocol import Action, Scale, State, Statistics
from distclip.policies.registry import register


@register
@dataclass(frozen=True)
class ParameterNorm(NormThreshold):
    """Scale each gradient so that its own p-norm is at most ``max_norm``.

    ``g_i *= min(1, max_norm / (||g_i||_p + 1e-6))``. Known elsewhere as ``tf.clip_by_norm`` and
    Keras ``clipnorm``.

    Args:
        max_norm: threshold >= 0; ``math.inf`` measures only.
        norm_type: order p > 0 or inf.

    Raises:
        ConfigurationError: a negative or NaN threshold, p <= 0.
    """

    name: ClassVar[str] = "parameter_norm"

    def update(self, statistics: Statistics, state: State) -> tuple[Sequence[Action], State]:
        norms = statistics.gradient_norms(self.norm_type)
        return (Scale(norm_coefficient(norms, self.max_norm), self.max_norm),), state


parameter_norm = ParameterNorm
