"""Clamping elements to a running mean of the largest one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from distclip.policies import _history
from distclip.policies._torch import torch
from distclip.policies.checks import Fraction
from distclip.policies.protocol import ClampingPolicy, Needs, ParameterInfo, State, Statistics
from distclip.policies.registry import register

if TYPE_CHECKING:
    from torch import Tensor


@register
@dataclass(frozen=True)
class RunningMax(ClampingPolicy):
    """Clamp each gradient's elements to a running mean of its largest magnitude.

    ``m = theta * m + (1 - theta) * max|g|``, this step's included, and the bound is
    ``m / (1 - theta ** t)``: AdaClip of Stable-SPAM (arXiv 2502.17055), with the authors'
    ``theta``. There an element above the bound is multiplied by ``bound / max|g|``; here it is
    clamped to the bound, so that it stays the largest.

    The bound is decided on the device, in the pass that measures. NaN, inf and 0 do not enter the
    mean; until a gradient has had an element that counts, it is not clamped.

    Args:
        theta: weight of the past, 0 <= theta < 1.

    Raises:
        ConfigurationError: a value outside of this range; at the first clip, a complex parameter.
    """

    theta: Fraction = 0.999
    name: ClassVar[str] = "running_max"
    per_parameter: ClassVar[frozenset[str]] = frozenset({"mean", "seen"})

    @property
    def needs(self) -> Needs:
        return Needs.of(gradients=[math.inf])

    def init(self, parameters: Sequence[ParameterInfo]) -> State:
        none = torch.zeros(len(parameters), dtype=torch.float64, device="cpu")
        return {"mean": none, "seen": none.long()}

    def update_bound(self, statistics: Statistics, state: State) -> tuple[Tensor, State]:
        largest = statistics.gradient_norms(math.inf)
        counts = _history.is_sample(largest)
        new = self.theta * state["mean"] + (1.0 - self.theta) * largest
        mean = torch.where(counts, new, state["mean"])
        seen = state["seen"] + counts.long()
        corrected = mean / (1.0 - self.theta ** seen.double())
        return torch.where(seen > 0, corrected, math.inf), {"mean": mean, "seen": seen}


running_max = RunningMax
