"""Clipping by the norm of all gradients together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from distclip.policies import _checks
from distclip.policies._protocol import Action, Needs, Policy, Scale, State, Statistics

TORCH_EPS = 1e-6
"""Added to the norm before dividing, as ``torch.nn.utils.clip_grad_norm_`` does."""


def norm_coefficient(norms: Tensor, max_norm: float) -> Tensor:
    """``min(1, max_norm / (norm + 1e-6))``, any shape; all 1 for an infinite ``max_norm``.

    An infinite threshold means "measure": inf / inf must not turn into NaN (pytorch#31367).
    """
    if math.isinf(max_norm):
        return torch.ones_like(norms)
    return torch.clamp(max_norm / (norms + TORCH_EPS), max=1.0)


@dataclass(frozen=True)
class GlobalNorm(Policy):
    """Scale all gradients so that their joint p-norm is at most ``max_norm``.

    ``g *= min(1, max_norm / (||g||_p + 1e-6))`` over all parameters together. Pascanu et al. 2013
    (arXiv 1211.5063, algorithm 1), with torch's 1e-6.

    Args:
        max_norm: threshold >= 0; ``math.inf`` measures only.
        norm_type: order p > 0 or inf.

    Raises:
        ConfigurationError: a negative or NaN threshold, p <= 0.
    """

    max_norm: float
    norm_type: float = 2.0
    name: ClassVar[str] = "global_norm"

    def __post_init__(self) -> None:
        max_norm = _checks.threshold(self.name, "max_norm", self.max_norm)
        object.__setattr__(self, "max_norm", max_norm)
        object.__setattr__(self, "norm_type", _checks.norm_order(self.name, self.norm_type))

    @property
    def needs(self) -> Needs:
        return Needs.of(gradients=[self.norm_type])

    def update(self, statistics: Statistics, state: State) -> tuple[Sequence[Action], State]:
        total = statistics.total_norm(self.norm_type)
        return (Scale(norm_coefficient(total, self.max_norm), self.max_norm),), state


global_norm = GlobalNorm
