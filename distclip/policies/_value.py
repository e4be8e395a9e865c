"""Clipping each element."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from distclip.policies.checks import Threshold
from distclip.policies.protocol import ClampingPolicy
from distclip.policies.registry import register


@register
@dataclass(frozen=True)
class Value(ClampingPolicy):
    """Clamp every gradient element to ``[-clip_value, clip_value]``.

    Elementwise, so it needs no statistics and means the same under every sharding. NaN stays NaN
    (``on_nonfinite`` decides about it). As ``torch.nn.utils.clip_grad_value_``.

    Args:
        clip_value: threshold >= 0.

    Raises:
        ConfigurationError: a negative or NaN threshold.
    """

    clip_value: Threshold
    name: ClassVar[str] = "value"

    @property
    def bound(self) -> float:
        """The clip value."""
        return self.clip_value


value = Value
