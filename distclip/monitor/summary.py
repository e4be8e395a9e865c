"""What recorded runs come to: numbers, and advice."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from distclip.errors import ConfigurationError
from distclip.monitor.runs import Run
from distclip.monitor.states import STATES, spike_score
from distclip.monitor.suggesting import Suggestion
from distclip.monitor.thinning import sparkline

PERCENTILES = (50, 90, 99)


@dataclass(frozen=True)
class Summary:
    """A run in a few numbers.

    ``percentiles`` and ``largest`` are of the norm before clipping. ``clipped`` is the share of the
    steps in which anything was clipped, ``share`` the mean share of the parameters that was: equal
    for ``global_norm``, while AGC may clip a little in every step. ``states`` are numbers of steps;
    ``spike_score`` is a percentage, of the norms.
    """

    name: str
    steps: int
    percentiles: dict[int, float]
    largest: float
    clipped: float
    share: float
    skipped: int
    nonfinite: int
    threshold: float
    states: dict[str, int]
    spike_score: float
    smallest: float
    sparkline: str
    exponents: tuple[str, ...] = ()
    noise_scale: tuple[float, float] | None = None
    """The last one in the log, and its step."""
    suggestion: Suggestion | None = None
    """A threshold for the next run; None where no norm is above 0."""

    @classmethod
    def of(cls, run: Run) -> Summary:
        """Summarise a run."""
        suggestion = None
        with contextlib.suppress(ConfigurationError):  # no norm above 0
            suggestion = Suggestion.of_norms([run])
        finite = run.total_norm[np.isfinite(run.total_norm)]
        known = run.threshold[np.isfinite(run.threshold)]
        fractions = run.clipped_fraction[np.isfinite(run.clipped_fraction)]
        return cls(
            name=run.name,
            steps=len(run.steps),
            percentiles={
                p: float(np.percentile(finite, p)) if finite.size else math.nan for p in PERCENTILES
            },
            largest=float(finite.max()) if finite.size else math.nan,
            clipped=float(run.clipped.mean()),
            share=float(fractions.mean()) if fractions.size else math.nan,
            skipped=int(run.skipped.sum()),
            nonfinite=int(run.nonfinite.sum()),
            threshold=float(known[-1]) if known.size and run.threshold_is_norm else math.nan,
            states={STATES[code]: n for code, n in sorted(Counter(run.states.tolist()).items())},
            spike_score=spike_score(run.total_norm),
            smallest=float(finite.min()) if finite.size else math.nan,
            sparkline=sparkline(run.total_norm),
            exponents=tuple(line for each in run.exponents.values() for line in each.lines()),
            noise_scale=(float(run.noise_scale[seen[-1]]), float(run.steps[seen[-1]]))
            if (seen := np.flatnonzero(np.isfinite(run.noise_scale))).size
            else None,
            suggestion=suggestion,
        )

    def advice(self) -> list[str]:
        """What the numbers suggest, after Google's tuning playbook; a sentence each."""
        advice = []
        if (found := self.suggestion) is not None:
            threshold = f"a threshold at the 90th percentile of the norms: {found.configuration}"
            advice.append("; ".join((threshold, *found.doubts)))
        if self.share > 0.5 and math.isfinite(self.threshold):
            advice.append(
                f"{self.share:.0%} of all gradients were clipped: where it is more than half of "
                f"them, lower the learning rate rather than clip on"
            )
        elif not self.clipped and math.isfinite(self.threshold):
            advice.append(
                f"no step came near the threshold {self.threshold:.3g} (largest norm "
                f"{self.largest:.3g}): it changes nothing"
            )
        if self.nonfinite:
            advice.append(
                f"NaN or inf gradients in {self.nonfinite} of {self.steps} steps: the key "
                f"'nonfinite' in the record names the parameters"
            )
        return advice


def summaries(runs: Sequence[Run]) -> list[Summary]:
    """The summary of each run."""
    return [Summary.of(run) for run in runs]
