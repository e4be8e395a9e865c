"""Clipping each optimizer parameter group by the norm of the group."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from distclip.errors import ConfigurationError
from distclip.policies._torch import torch
from distclip.policies.norm_threshold import NormThreshold, joint_coefficient
from distclip.policies.protocol import (
    Action,
    Needs,
    Scale,
    State,
    Statistics,
)
from distclip.policies.registry import register

if TYPE_CHECKING:
    from torch import Tensor


@register
@dataclass(frozen=True)
class GroupNorm(NormThreshold):
    """Scale the gradients of each optimizer parameter group by the group's own p-norm.

    ``g *= min(1, max_norm / (||g_group||_p + 1e-6))``. It needs the optimizer: give
    ``GradClipper(..., optimizer=...)`` or use ``attach(optimizer)``.

    Args:
        max_norm: threshold >= 0 for every group; ``math.inf`` measures only.
        norm_type: order p > 0 or inf.

    Raises:
        ConfigurationError: a negative or NaN threshold, p <= 0; no optimizer known.
    """

    name: ClassVar[str] = "group_norm"

    @property
    def needs(self) -> Needs:
        return Needs(gradient_norms=frozenset((self.norm_type,)), groups=True)

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
            where = _placed(tuple(indices), norms.device)
            coefficients[where] = joint_coefficient(norms[where], self.norm_type, self.max_norm)
        return (Scale(coefficients, self.max_norm),), state


@functools.lru_cache(maxsize=64)
def _placed(indices: tuple[int, ...], device: torch.device) -> Tensor:
    """Group numbers on a device. They never change, so they are copied there once."""
    return torch.tensor(indices, device=device)


group_norm = GroupNorm
