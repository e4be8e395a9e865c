"""Skipping the steps whose norm is above a fixed threshold."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from distclip.errors import ConfigurationError
from distclip.policies._torch import torch
from distclip.policies.checks import Threshold
from distclip.policies.norm_threshold import NormThreshold, norm_coefficient
from distclip.policies.protocol import Action, Scale, Skip, State, Statistics
from distclip.policies.registry import register


@register
@dataclass(frozen=True)
class SkipNorm(NormThreshold):
    """Skip the whole update where the joint p-norm of the gradients is above ``max_norm``.

    Below it, ``g *= min(1, clip_norm / (||g||_p + 1e-6))``. Megatron-LM's
    ``grad_norm_skip_threshold`` (NVIDIA/Megatron-LM#3460) with its ``clip_grad``, axlearn's
    ``skip_and_clip_by_global_norm``.

    A step with a NaN or inf norm is always skipped. Nothing is remembered, and no series of skips
    is ended: where the norm rises above ``max_norm`` for good, no update happens any more, while
    ``report.skipped`` says so at every step. :class:`SkipSpikes` follows the norm and ends a
    series.

    Args:
        max_norm: threshold >= 0; ``math.inf`` skips non-finite norms only.
        norm_type: order p > 0 or inf.
        clip_norm: what is not skipped is scaled to at most this norm, >= 0 and at most
            ``max_norm``; ``math.inf`` (or None) scales nothing.

    Raises:
        ConfigurationError: a negative or NaN threshold, ``clip_norm > max_norm``, p <= 0.
    """

    clip_norm: Threshold | None = None
    name: ClassVar[str] = "skip_norm"

    def __post_init__(self) -> None:
        super().__post_init__()
        limit = math.inf if self.clip_norm is None else self.clip_norm
        if not math.isinf(limit) and limit > self.max_norm:
            raise ConfigurationError(
                f"skip_norm: clip_norm must be at most max_norm, which is {self.max_norm}, got "
                f"{limit}; nothing would ever be clipped, since larger norms are skipped"
            )
        object.__setattr__(self, "clip_norm", limit)

    def update(self, statistics: Statistics, state: State) -> tuple[Sequence[Action], State]:
        total = statistics.total_norm(self.norm_type)
        skip = Skip(~torch.isfinite(total) | (total > self.max_norm))
        limit = math.inf if self.clip_norm is None else self.clip_norm
        if math.isinf(limit):
            return (skip,), state
        return (skip, Scale(norm_coefficient(total, limit), limit)), state


skip_norm = SkipNorm
