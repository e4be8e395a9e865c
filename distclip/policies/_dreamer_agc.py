"""Adaptive gradient clipping as in DreamerV3."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from distclip.policies._torch import torch
from distclip.policies.checks import Positive
from distclip.policies.protocol import Action, Needs, Scale, ScalingPolicy, State, Statistics
from distclip.policies.registry import register


@register
@dataclass(frozen=True)
class DreamerAGC(ScalingPolicy):
    """DreamerV3's AGC: each tensor's gradient norm against its weight norm.

    ``g / max(1, ||g|| / (clip * max(pmin, ||p||)))`` per parameter, every parameter, from the
    current weights. Hafner et al. (arXiv 2301.04104), ``embodied/jax/opt.py: clip_by_agc``.

    Args:
        clip: largest ratio of gradient norm to weight norm; finite, > 0.
        pmin: floor of the weight norm; finite, > 0.

    Raises:
        ConfigurationError: an argument that is not finite and > 0.
    """

    clip: Positive = 0.3
    pmin: Positive = 1e-3
    name: ClassVar[str] = "dreamer_agc"

    @property
    def needs(self) -> Needs:
        return Needs.of(gradients=[2.0], weights=[2.0])

    def update(self, statistics: Statistics, state: State) -> tuple[Sequence[Action], State]:
        upper = torch.clamp(statistics.weight_norms(2.0), min=self.pmin) * self.clip
        ratio = statistics.gradient_norms(2.0) / upper
        return (Scale(1.0 / torch.clamp(ratio, min=1.0), self.clip),), state


dreamer_agc = DreamerAGC
