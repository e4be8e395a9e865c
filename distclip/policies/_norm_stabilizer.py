"""GradientStabilizer: the direction of each gradient, with the norm of running moments."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from distclip.policies import _history
from distclip.policies._torch import torch
from distclip.policies.checks import Fraction, Positive
from distclip.policies.protocol import (
    Action,
    Needs,
    ParameterInfo,
    Scale,
    ScalingPolicy,
    State,
    Statistics,
)
from distclip.policies.registry import register

SMALLEST_NORM = 1e-300
"""Floor of a norm that is divided by; only a float64 gradient can lie below it."""


@register
@dataclass(frozen=True)
class NormStabilizer(ScalingPolicy):
    """Keep each gradient's direction, and set its norm to a ratio of running moments of it.

    ``m = gamma1 * m + (1 - gamma1) * ||g||``, ``v = gamma2 * v + (1 - gamma2) * ||g||**2``, both
    divided by ``1 - gamma**t``; then ``g *= (m / (sqrt(v) + eps)) / ||g||``. GradientStabilizer
    (arXiv 2502.17055), AdaGN in the code of Stable-SPAM, with the defaults of that code.

    Norms become about 1 whatever they were, and a spike is not larger than any other step. **A
    coefficient may exceed 1**: small gradients are raised. The learning rate of SGD means something
    else under this policy; that of Adam hardly changes. It is per parameter, so it turns the
    direction of the whole update.

    NaN, inf and 0 enter neither moment; a gradient of 0 stays as it is.

    Args:
        gamma1: weight of the past in the mean, 0 <= gamma1 < 1.
        gamma2: weight of the past in the mean square, 0 <= gamma2 < 1.
        eps: added to the root of the mean square, > 0.

    Raises:
        ConfigurationError: a value outside of these ranges.
    """

    gamma1: Fraction = 0.7
    gamma2: Fraction = 0.9
    eps: Positive = 1e-8
    name: ClassVar[str] = "norm_stabilizer"
    per_parameter: ClassVar[frozenset[str]] = frozenset(("mean", "root", "seen"))
    memory_fields: ClassVar[frozenset[str] | None] = frozenset(("gamma1", "gamma2"))

    @property
    def needs(self) -> Needs:
        return Needs.of(gradients=[2.0])

    def init(self, parameters: Sequence[ParameterInfo]) -> State:
        none = torch.zeros(len(parameters), dtype=torch.float64, device="cpu")
        return {"mean": none, "root": none.clone(), "seen": none.long()}

    def update(self, statistics: Statistics, state: State) -> tuple[Sequence[Action], State]:
        norms = statistics.gradient_norms(2.0)
        counts = _history.is_sample(norms)
        sample = torch.where(counts, norms, 1.0)
        mean = self.gamma1 * state["mean"] + (1.0 - self.gamma1) * sample
        # As a root, so that the square of no norm can overflow.
        past = state["root"] * math.sqrt(self.gamma2)
        root = torch.hypot(past, sample * math.sqrt(1.0 - self.gamma2))
        state = {
            "mean": torch.where(counts, mean, state["mean"]),
            "root": torch.where(counts, root, state["root"]),
            "seen": state["seen"] + counts.long(),
        }
        steps = state["seen"].double()
        first = state["mean"] / (1.0 - self.gamma1**steps)
        second = state["root"] / (1.0 - self.gamma2**steps).sqrt()
        # What is not finite is handed on as it is: NaN by NaN, inf by 0.
        divided = first / (second + self.eps) / torch.clamp(norms, min=SMALLEST_NORM)
        return (Scale(torch.where((norms == 0) | (steps == 0), 1.0, divided)),), state


norm_stabilizer = NormStabilizer
