"""A clamping policy whose bound its own state decides on, for tests."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from distclip import policies
from distclip.policies import Needs


@policies.register
@dataclass(frozen=True)
class RunningMax(policies.ClampingPolicy):
    """Clamp each gradient to a running mean of its largest magnitude, bias-corrected.

    ``m = theta * m + (1 - theta) * max|g|``, this step's included, and the bound is
    ``m / (1 - theta ** t)``, as AdaClip in Stable-SPAM (arXiv 2502.17055) has its threshold.

    Args:
        theta: weight of the past.
    """

    theta: float = 0.75
    name: ClassVar[str] = "running_max"
    per_parameter: ClassVar[frozenset[str]] = frozenset({"mean", "seen"})

    @property
    def needs(self) -> Needs:
        return Needs.of(gradients=[math.inf])

    def init(self, parameters: Any) -> Any:
        none = torch.zeros(len(parameters), dtype=torch.float64)
        return {"mean": none, "seen": none.long()}

    def update_bound(self, statistics: Any, state: Any) -> Any:
        largest = statistics.gradient_norms(math.inf)
        counts = torch.isfinite(largest) & (largest > 0)
        new = self.theta * state["mean"] + (1.0 - self.theta) * largest
        mean = torch.where(counts, new, state["mean"])
        seen = state["seen"] + counts.long()
        corrected = mean / (1.0 - self.theta ** seen.double())
        return torch.where(seen > 0, corrected, math.inf), {"mean": mean, "seen": seen}
