"""Skipping the steps whose norm, or loss, is a spike."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from distclip.errors import ConfigurationError
from distclip.policies import _history
from distclip.policies._torch import torch
from distclip.policies.checks import LONGEST, Positive, at_least
from distclip.policies.norm_threshold import coefficient_to
from distclip.policies.protocol import (
    Action,
    Needs,
    ParameterInfo,
    Scale,
    ScalingPolicy,
    Skip,
    State,
    Statistics,
)
from distclip.policies.registry import register

if TYPE_CHECKING:
    from torch import Tensor


@register
@dataclass(frozen=True)
class SkipSpikes(ScalingPolicy):
    """Skip the whole update where its norm lies ``sigma`` deviations above those before it.

    A spike is ``||g|| - mean > sigma * std`` over the last ``window`` norms that were no spikes
    (standard deviation with n - 1), from ``min_history`` norms on. As the skip-step optimizer of
    OLMo, where spikes enter the window.

    **The end of a series.** After ``max_consecutive`` skips in a row the next step is not skipped,
    whatever its norm: such a series is the new normal, so the window is forgotten and begins with
    this norm, and nothing is skipped until it holds ``min_history`` again. Put a clipping policy
    behind this one (``chain(skip_spikes(), global_norm(1.0))``) for those steps.

    A step with a NaN or inf norm is always skipped and leaves no trace: it neither enters the
    window nor counts in a series. A norm of 0 does not enter either.

    Put it first in a chain, where it sees the norms as they are. What a step skipped by it would
    have left in the memory of other policies is forgotten.

    Args:
        window: how many norms are remembered, 2 to 1,000,000.
        sigma: deviations above the mean at which a spike begins, > 0.
        min_history: norms before anything is skipped, 2 to ``window``.
        max_consecutive: skips in a row, >= 1.
        loss: also skip where the loss is a spike, by the same rule over a window of its own. Give
            it by ``clipper.observe(loss)`` or ``clipper.clip_(loss=loss)``; it is averaged over
            the ranks. A step without a loss, or with one that is not finite, is judged by its norm.
        clip_sigma: what is not skipped is scaled to at most this many deviations above the mean,
            > 0 and at most ``sigma``; also the step that ends a series. None scales nothing. The
            window takes the norm as it was before.

    Raises:
        ConfigurationError: a value outside of these ranges.
    """

    window: Annotated[int, at_least(2), LONGEST] = 128
    sigma: Positive = 6.0
    min_history: Annotated[int, at_least(2)] = 64
    max_consecutive: Annotated[int, at_least(1)] = 10
    loss: bool = False
    clip_sigma: Positive | None = None
    name: ClassVar[str] = "skip_spikes"
    memory_fields: ClassVar[frozenset[str] | None] = frozenset(("window", "loss"))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.min_history > self.window:
            raise ConfigurationError(
                f"skip_spikes: min_history must be at most window, which is {self.window}, got "
                f"{self.min_history}; no step would ever be skipped"
            )
        if not isinstance(self.loss, bool):
            raise ConfigurationError(f"skip_spikes: loss must be true or false, got {self.loss!r}")
        if self.clip_sigma is not None and self.clip_sigma > self.sigma:
            raise ConfigurationError(
                f"skip_spikes: clip_sigma must be at most sigma, which is {self.sigma}, got "
                f"{self.clip_sigma}; nothing would be clipped, since larger norms are skipped"
            )

    @property
    def needs(self) -> Needs:
        return Needs(gradient_norms=frozenset((2.0,)), loss=self.loss)

    def init(self, parameters: Sequence[ParameterInfo]) -> State:
        ring = torch.zeros(self.window, dtype=torch.float64, device="cpu")
        none = torch.zeros((), dtype=torch.int64, device="cpu")
        state = {"norms": ring, "seen": none, "series": none.clone()}
        if self.loss:
            state |= {"losses": ring.clone(), "losses_seen": none.clone()}
        return state

    def update(self, statistics: Statistics, state: State) -> tuple[Sequence[Action], State]:
        total = statistics.total_norm(2.0)
        finite, series = torch.isfinite(total), state["series"]
        spike = self._is_spike(state["norms"], state["seen"], total)
        loss = statistics.loss
        if loss is not None:
            spike = spike | self._is_spike(state["losses"], state["losses_seen"], loss)
        spike = spike & finite
        over = spike & (series >= self.max_consecutive)
        skip = (spike & ~over) | ~finite

        def remember(ring: str, seen: str, sample: Tensor, wanted: Tensor) -> State:
            begun = torch.where(over, 0, state[seen])
            values, count = _history.put(state[ring], begun, sample, wanted & ~skip)
            return {ring: values, seen: count}

        new = remember("norms", "seen", total, _history.is_sample(total))
        if loss is not None:
            new |= remember("losses", "losses_seen", loss, torch.isfinite(loss))
        longer = torch.where(spike & ~over, series + 1, 0)
        new["series"] = torch.where(finite, longer, series)
        if self.clip_sigma is None:
            return (Skip(skip),), new
        return (Skip(skip), self._clip(state, total, self.clip_sigma)), new

    def _clip(self, state: State, total: Tensor, sigma: float) -> Scale:
        mean, deviation = _history.mean_and_deviation(state["norms"], state["seen"])
        known = state["seen"] >= self.min_history
        limit = torch.where(known, mean + sigma * deviation, math.inf)
        shown = torch.where(known, limit, math.nan)
        return Scale(coefficient_to(total, limit), shown)

    def _is_spike(self, ring: Tensor, seen: Tensor, value: Tensor) -> Tensor:
        mean, deviation = _history.mean_and_deviation(ring, seen)
        return (seen >= self.min_history) & (value - mean > self.sigma * deviation)


skip_spikes = SkipSpikes
