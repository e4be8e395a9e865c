"""Clipping each parameter's gradient by its root mean square."""

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
class BlockRMS(ScalingPolicy):
    """Divide each gradient by ``max(1, RMS(g) / threshold)``.

    ``RMS(g) = ||g||_2 / sqrt(numel)`` over the *logical* tensor, whatever its sharding. No eps, as
    ``optax.clip_by_block_rms``.

    Args:
        threshold: the RMS allowed per parameter; finite, > 0.

    Raises:
        ConfigurationError: a threshold that is not finite and > 0.
    """

    threshold: Positive
    name: ClassVar[str] = "block_rms"

    @property
    def needs(self) -> Needs:
        return Needs.of(gradients=[2.0])

    def update(self, statistics: Statistics, state: State) -> tuple[Sequence[Action], State]:
        norms = statistics.gradient_norms(2.0)
        numels = [max(1, parameter.numel) for parameter in statistics.parameters]
        limit = norms.new_tensor(numels).sqrt() * self.threshold
        return (Scale(1.0 / torch.clamp(norms / limit, min=1.0), self.threshold),), state


block_rms = BlockRMS
