"""Whether the gradient norms of a run are normal: judged against the run's own history."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from distclip.errors import ConfigurationError

NormState: TypeAlias = Literal["normal", "spike", "exploding", "vanishing", "nonfinite"]
STATES: tuple[NormState, ...] = ("normal", "spike", "exploding", "vanishing", "nonfinite")

MOST_LINES = 20
"""Changes of state that are logged as warnings; later ones as information."""

_logger = logging.getLogger("distclip.monitor")

_BINS, _DECADES = 32, 60
"""Bins a decade, and decades, of the histogram of all norms so far: 1e-30 to 1e30."""


class States:
    """Judges one norm after another; two clippers need two of these.

    * ``nonfinite``: the norm, or a parameter's, is NaN or inf.
    * ``spike``: at least twice the median of the last ``window`` norms, and six robust standard
      deviations above it (of the logarithms, from the quartiles).
    * ``exploding``: ``exploding`` or more, and above the run's median (of all its norms so far) by
      ``exploding / normal[1]`` at least: a factor of 10 by default. A single such norm after a
      normal past is a spike; ``patience`` of them in a row are an explosion.
    * ``vanishing``: below ``vanishing``, and below the run's median by ``vanishing / normal[0]``.
    * ``normal``: everything else.

    The factors are there because there is no universal size of a norm: it depends on model, loss
    and batch. A run whose norms are 500 from the start is normal, as is one at 0.001. Before
    ``patience ** 2`` norms are known, the bounds decide alone.

    A change is one line in the log ``distclip.monitor``: a warning for the first 20. Of the first
    ``patience`` norms only NaN and inf are worth one.

    Args:
        normal: norms between these are ordinary for most models.
        exploding: norms from here on are large for most models.
        vanishing: norms below this are small for most models.
        window: norms that a spike is judged by.
        patience: norms in a row that make an explosion of a spike.

    Raises:
        ConfigurationError: bounds that are not positive and in this order.
    """

    def __init__(
        self,
        normal: Sequence[float] = (1.0, 10.0),
        exploding: float = 100.0,
        vanishing: float = 0.01,
        *,
        window: int = 128,
        patience: int = 5,
    ) -> None:
        low, high = normal
        if not 0.0 < vanishing <= low <= high <= exploding < math.inf:
            raise ConfigurationError(
                f"states: expected 0 < vanishing <= normal[0] <= normal[1] <= exploding, got "
                f"vanishing={vanishing!r}, normal={list(normal)!r}, exploding={exploding!r}"
            )
        self.exploding, self.vanishing = exploding, vanishing
        self.growth, self.decay = exploding / high, vanishing / low
        self.window, self.patience = window, patience
        self.state: NormState = "normal"
        self._told: NormState = "normal"
        self._recent = np.zeros(window)
        """Logarithms of the newest norms, in a ring."""
        self._counts = np.zeros(_BINS * _DECADES, np.int64)
        self._known = self._since = self._in_a_row = self._lines = 0
        self._last: int | None = None
        self._limit()

    def judge(self, step: int, norm: float, nonfinite: bool = False) -> NormState:
        """The state at a step; asked again about the same one, the same answer.

        Args:
            step: for the line in the log.
            norm: of all gradients, before clipping.
            nonfinite: whether some gradient is not finite.
        """
        if step != self._last:
            self._last = step
            usual = self.usual
            self.state = self._judged(norm, nonfinite)
            if self.state != self._told and (nonfinite or self._known > self.patience):
                self._told = self.state
                self._tell(step, norm, usual)
        return self.state

    def _judged(self, norm: float, nonfinite: bool) -> NormState:
        if nonfinite or not math.isfinite(norm):
            return "nonfinite"
        spike, large = norm > self._spike, norm >= self._large
        self._in_a_row = self._in_a_row + 1 if large else 0
        young = self._known < self.patience**2
        self._learn(norm)
        if large and (young or self._in_a_row >= self.patience or not spike):
            return "exploding"
        if norm < self._small:
            return "vanishing"
        return "spike" if spike else "normal"

    def _learn(self, norm: float) -> None:
        logarithm = math.log10(norm) if norm > 0.0 else -_DECADES / 2
        self._recent[self._known % self.window] = logarithm
        place = int((logarithm + _DECADES / 2) * _BINS)
        self._counts[min(max(place, 0), len(self._counts) - 1)] += 1
        self._known += 1
        self._since += 1
        if self._since >= 16 or self._known <= self.patience**2:
            self._limit()

    def _limit(self) -> None:
        """Set the limits anew; every 16th norm is enough, and costs little."""
        self._since = 0
        self.usual = math.nan
        """Median of all norms so far; NaN while there are too few."""
        self._spike, self._large, self._small = math.inf, self.exploding, self.vanishing
        if self._known < self.patience**2:
            return
        place = int(np.searchsorted(np.cumsum(self._counts), self._known / 2))
        self.usual = 10.0 ** ((place + 0.5) / _BINS - _DECADES / 2)
        self._large = max(self.exploding, self.growth * self.usual)
        self._small = min(self.vanishing, self.decay * self.usual)
        recent = np.sort(self._recent[: self._known])
        count = len(recent)
        low, median, high = recent[count // 4], recent[count // 2], recent[(3 * count) // 4]
        spread = 6.0 * (high - low) / 1.349  # the quartiles of a normal distribution lie so apart
        self._spike = 10.0 ** min(median + max(spread, math.log10(2.0)), 308.0)

    def _tell(self, step: int, norm: float, usual: float) -> None:
        self._lines += 1
        level = logging.WARNING if self._lines <= MOST_LINES else logging.INFO
        known = "" if math.isnan(usual) else f", usual so far {usual:.3g}"
        more = "; further changes are logged as information" if self._lines == MOST_LINES else ""
        _logger.log(
            level, "gradients at step %d: %s (norm %.4g%s)%s", step, self.state, norm, known, more
        )


def judged(norms: npt.NDArray[Any], bad: npt.NDArray[Any]) -> list[NormState]:
    """The states of a recorded run whose log has none; logs nothing."""
    states = States()
    return [
        states._judged(norm, nonfinite)
        for norm, nonfinite in zip(norms.tolist(), bad.tolist(), strict=True)
    ]


def spike_score(values: npt.NDArray[np.float64], window: int = 1000, sigma: float = 7.0) -> float:
    """Percentage of values that lie ``sigma`` standard deviations or more from the rolling average.

    Of OLMo 2 (https://arxiv.org/abs/2501.00656, section 3.1): seven standard deviations, over the
    last 1,000 values. Values that are not finite count as spikes. Fewer than 10 values before one
    are no average.
    """
    finite = np.isfinite(values)
    known = values[finite]
    spikes = int((~finite).sum())
    if not len(values):
        return math.nan
    for start in range(10, len(known), 4096):
        stop = min(start + 4096, len(known))
        first = max(start - window, 0)
        part = known[first:stop]
        scale = max(float(np.abs(part).max()), 1e-300)  # squares stay in range
        if first == start - window:  # whole windows
            windows = np.lib.stride_tricks.sliding_window_view(part[:-1] / scale, window)
            mean, deviation = windows.mean(axis=1), windows.std(axis=1)
        else:
            mean, deviation = _growing(part / scale, start - first, window)
        away = np.abs(part[start - first :] / scale - mean)
        spikes += int(((away >= sigma * deviation) & (away > 1e-12)).sum())
    return 100.0 * spikes / len(values)


def _growing(
    values: npt.NDArray[np.float64], start: int, window: int
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Mean and deviation of what comes before each value from ``start`` on, where few do."""
    before = [values[max(i - window, 0) : i] for i in range(start, len(values))]
    return np.array([b.mean() for b in before]), np.array([b.std() for b in before])
