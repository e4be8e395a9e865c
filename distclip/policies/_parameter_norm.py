"""Clipping each parameter's gradient by its own norm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from distclip.policies import _checks
from distclip.policies._global_norm import norm_coefficient
from distclip.policies._protocol import Action, Needs, Policy, Scale, State, Statistics


@dataclass(frozen=True)
class ParameterNorm(Policy):
    """Scale each gradient so that its own p-norm is at most ``max_norm``.

    ``g_i *= min(1, max_norm / (||g_i||_p + 1e-6))``. Known elsewhere as ``tf.clip_by_norm`` and
    Keras ``clipnorm``.

    Args:
        max_norm: threshold >= 0; ``math.inf`` measures only.
        norm_type: order p > 0 or inf.

    Raises:
        ConfigurationError: a negative or NaN threshold, p <= 0.
    """

    max_norm: float
    norm_type: float = 2.0
    name: ClassVar[str] = "parameter_norm"

    def __post_init__(self) -> None:
        max_norm = _checks.threshold(self.name, "max_norm", self.max_norm)
        object.__setattr__(self, "max_norm", max_norm)
        object.__setattr__(self, "norm_type", _checks.norm_order(self.name, self.norm_type))

    @property
    def needs(self) -> Needs:
        return Needs.of(gradients=[self.norm_type])

    def update(self, statistics: Statistics, state: State) -> tuple[Sequence[Action], State]:
        norms = statistics.gradient_norms(self.norm_type)
        return (Scale(norm_coefficient(norms, self.max_norm), self.max_norm),), state


parameter_norm = ParameterNorm
