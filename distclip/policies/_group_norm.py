"""Clipping each optimizer parameter group by the norm of the group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from distclip.errors import ConfigurationError
from distclip.policies import _checks
from distclip.policies._global_norm import norm_coefficient
from distclip.policies._protocol import (
    Action,
    Needs,
    Policy,
    Scale,
    State,
    Statistics,
    combine_norms,
)


@dataclass(frozen=True)
class GroupNorm(Policy):
    """Scale the gradients of each optimizer parameter group by the group's own p-norm.

    ``g *= min(1, max_norm / (||g_group||_p + 1e-6))``. It needs the optimizer: give
    ``GradClipper(..., optimizer=...)`` or use ``attach(optimizer)``.

    Args:
        max_norm: threshold >= 0 for every group; ``math.inf`` measures only.
        norm_type: order p > 0 or inf.

    Raises:
        ConfigurationError: a negative or NaN threshold, p <= 0; no optimizer known.
    """

    max_norm: float
    norm_type: float = 2.0
    name: ClassVar[str] = "group_norm"

    def __post_init__(self) -> None:
        max_norm = _checks.threshold(self.name, "max_norm", self.max_norm)
        object.__setattr__(self, "max_norm", max_norm)
        object.__setattr__(self, "norm_type", _checks.norm_order(self.name, self.norm_type))

    @property
    def needs(self) -> Needs:
        return Needs.of(gradients=[self.norm_type])

    def update(self, statistics: Statistics, state: State) -> tuple[Sequence[Action], State]:
        norms = statistics.gradient_norms(self.norm_type)
        members: dict[int, list[int]] = {}
        for index, parameter in enumerate(statistics.parameters):
            if parameter.group is None:
                raise ConfigurationError(
                    f"group_norm: parameter {parameter.name!r} is in no optimizer parameter "
                    f"group; pass GradClipper(..., optimizer=optimizer) or use attach(optimizer)"
                )
            members.setdefault(parameter.group, []).append(index)
        coefficients = torch.ones_like(norms)
        for indices in members.values():
            where = torch.tensor(indices, device=norms.device)
            total = combine_norms(norms[where], self.norm_type)
            coefficients[where] = norm_coefficient(total, self.max_norm)
        return (Scale(coefficients, self.max_norm),), state


group_norm = GroupNorm
