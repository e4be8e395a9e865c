"""ZClip: norms that are outliers by their z-score are clipped."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from distclip.policies import _history
from distclip.policies._torch import torch
from distclip.policies.checks import Fraction, Positive, Threshold, at_least
from distclip.policies.norm_threshold import coefficient_to
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

if TYPE_CHECKING:
    from torch import Tensor

Z_SCORE_EPS = 1e-6
"""Added to the standard deviation in the z-score, as the authors' code does."""


@register
@dataclass(frozen=True)
class ZClip(ScalingPolicy):
    """Global norm clipping of outliers, by running mean and deviation of the norm.

    With ``z = (||g|| - mu) / (sigma + 1e-6)``: where ``z > z_thresh``, the norm is clipped to
    ``c = mu + (z_thresh**2 / z) * sigma``, so the larger the outlier, the nearer to ``mu``. Then
    ``mu = alpha * mu + (1 - alpha) * x`` and ``sigma**2 = alpha * sigma**2 + (1 - alpha) * (x -
    mu)**2`` with ``x = min(||g||, c)``. The first ``warmup_steps`` norms give the first ``mu`` and
    ``sigma``. A fixed ceiling ``max_norm`` holds besides, from the first step on. ZClip, 2025
    (arXiv 2504.02507, "reciprocal" clipping), with the authors' defaults.

    NaN, inf and 0 enter neither statistic, and do not count as steps of the warm-up. ``c`` lies
    between ``mu`` and ``mu + z_thresh * sigma``, and ``mu`` never exceeds the largest finite norm
    seen. Where the norm has risen for good the threshold hardly follows, since outliers enter
    clipped: see docs/policies_with_memory.md.

    Args:
        z_thresh: how many deviations above the mean an outlier begins, > 0.
        alpha: weight of the past in the running statistics, 0 <= alpha < 1.
        warmup_steps: norms that the first statistics are made of, >= 1.
        max_norm: ceiling of the norm, >= 0; ``math.inf`` (or None) for none.

    Raises:
        ConfigurationError: a value outside of these ranges.
    """

    z_thresh: Positive = 2.5
    alpha: Fraction = 0.97
    warmup_steps: Annotated[int, at_least(1)] = 25
    max_norm: Threshold | None = 1.0
    name: ClassVar[str] = "zclip"
    memory_fields: ClassVar[frozenset[str] | None] = frozenset(("alpha", "warmup_steps"))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_norm is None:
            object.__setattr__(self, "max_norm", math.inf)

    @property
    def needs(self) -> Needs:
        return Needs.of(gradients=[2.0])

    def init(self, parameters: Sequence[ParameterInfo]) -> State:
        zero = torch.zeros((), dtype=torch.float64, device="cpu")
        return {"mean": zero, "deviation": zero.clone(), "seen": zero.long()}

    def update(self, statistics: Statistics, state: State) -> tuple[Sequence[Action], State]:
        total = statistics.total_norm(2.0)
        wanted = _history.is_sample(total)
        norm = torch.where(wanted, total, state["mean"])
        mean, deviation, seen = state["mean"], state["deviation"], state["seen"]
        warm = seen >= self.warmup_steps

        z = (norm - mean) / (deviation + Z_SCORE_EPS)
        outlier = warm & (z > self.z_thresh)
        limit = torch.where(outlier, mean + (self.z_thresh**2 / z) * deviation, math.inf)
        limit = torch.where(torch.isnan(limit), mean, limit)  # a deviation of 0

        first = _first(mean, deviation, seen, norm)
        later = self._later(mean, deviation, torch.minimum(norm, limit))
        new = [torch.where(warm, b, a) for a, b in zip(first, later, strict=True)]
        state = {
            "mean": torch.where(wanted, new[0], mean),
            "deviation": torch.where(wanted, new[1], deviation),
            "seen": seen + wanted.long(),
        }
        limit = torch.clamp(limit, max=self.max_norm)
        shown = torch.where(torch.isinf(limit), math.nan, limit)
        return (Scale(coefficient_to(total, limit), shown),), state

    def _later(self, mean: Tensor, deviation: Tensor, sample: Tensor) -> tuple[Tensor, Tensor]:
        mean = self.alpha * mean + (1.0 - self.alpha) * sample
        # As a root, so that the square of no norm can overflow.
        past = deviation * math.sqrt(self.alpha)
        return mean, torch.hypot(past, (sample - mean) * math.sqrt(1.0 - self.alpha))


def _first(mean: Tensor, deviation: Tensor, seen: Tensor, sample: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation (n) with one sample more (Welford)."""
    count = seen.double() + 1.0
    step = sample - mean
    spread = step * ((count - 1.0).sqrt() / count)
    return mean + step / count, torch.hypot(deviation * ((count - 1.0) / count).sqrt(), spread)


zclip = ZClip
