"""Thresholds from recorded runs: a percentile of their norms, or of their ratios."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from distclip.errors import ConfigurationError
from distclip.monitor.runs import Floats, Run, configuration

CANDIDATES = (50.0, 75.0, 90.0, 95.0, 99.0)
"""Percentiles that a suggestion shows beside its own."""

FEW_STEPS = 100
"""Steps below which a percentile says little."""

AGC_EPS = 1e-3
"""AGC's floor of the norm of a weight."""

Values = npt.NDArray[Any]


@dataclass(frozen=True)
class Suggestion:
    """A threshold, after Google's tuning playbook, and what others would have clipped.

    ``threshold`` is the asked percentile of what was recorded before clipping, of all runs
    together: as ``about`` says, in numbers. ``clipped`` is the share of these ``steps`` in which
    anything was clipped; ``spread`` the largest of the runs' medians by the smallest. A line of
    ``candidates`` is for another percentile. ``what`` was recorded: norms, or ratios.
    """

    threshold: float
    configuration: str
    about: str
    steps: int
    clipped: float
    spread: float
    candidates: tuple[str, ...]
    what: str

    @property
    def doubts(self) -> list[str]:
        """Why a threshold from these runs may be a wrong one; a sentence each."""
        doubts = []
        if self.clipped > 0.0:
            share = f"{self.clipped:.0%}" if self.clipped >= 0.01 else "under 1%"
            doubts.append(
                f"in {share} of these steps something was clipped: their {self.what} are those of "
                f"a run that was already held back; record one with policy: measure"
            )
        if self.steps < FEW_STEPS:
            doubts.append(f"{self.steps} steps are few for a percentile")
        if self.spread > 2.0:
            doubts.append(
                f"the runs differ: the largest of their median {self.what} is {self.spread:.3g} "
                f"times the smallest; a threshold for all of them fits none"
            )
        return doubts

    @classmethod
    def of_norms(
        cls, runs: Sequence[Run], percentile: float = 90.0, first_step: float = 0.0
    ) -> Suggestion:
        """A ``max_norm`` for ``global_norm``.

        Args:
            runs: of one model, at the learning rate that is meant.
            percentile: in (0, 100].
            first_step: steps before it do not count.

        Raises:
            ConfigurationError: another percentile, or no norm that is finite and not zero.
        """
        chosen = [np.isfinite(run.total_norm) & (run.steps >= first_step) for run in runs]
        each = [run.total_norm[here] for run, here in zip(runs, chosen, strict=True)]
        norms = np.concatenate(each)
        found = _percentile(norms, percentile)
        if found <= 0.0:
            raise ConfigurationError(
                f"suggest: {norms.size} finite norms{_since(first_step)}, and no threshold above 0 "
                f"in them; give the log of a run that trains"
            )
        levels = np.percentile(norms, CANDIDATES).tolist()
        return cls(
            threshold=found,
            configuration=configuration(found),
            about=f"percentile {percentile:g} of {norms.size} norms, median "
            f"{np.median(norms):.3g}, largest {norms.max():.3g}",
            steps=norms.size,
            clipped=_clipped(runs, chosen),
            spread=_spread(each),
            candidates=tuple(
                f"percentile {p:g}: max_norm {level:.3g} clips {(norms > level).mean():.1%} of "
                f"these steps"
                for p, level in zip(CANDIDATES, levels, strict=True)
            ),
            what="norms",
        )

    @classmethod
    def of_ratios(
        cls, runs: Sequence[Run], percentile: float = 90.0, first_step: float = 0.0
    ) -> Suggestion:
        """A ``clip_factor`` for ``agc(unit="tensor")``.

        What counts is the norm of a whole gradient by that of its weight, of at least ``AGC_EPS``,
        for each parameter and step: what that policy compares with its factor. A gradient of 0 does
        not count.

        Args:
            runs: as for :meth:`of_norms`, with ratios of each parameter.
            percentile: in (0, 100].
            first_step: steps before it do not count.

        Raises:
            ConfigurationError: another percentile, or no ratio that is finite and not zero.
        """
        tables, chosen = [], []
        for run in runs:
            table, measured = _ratios(run, first_step)
            tables.append(table)
            chosen.append(np.isin(run.steps, measured))
        each = [table[~np.isnan(table)] for table in tables]
        ratios = np.concatenate(each)
        found = _percentile(ratios, percentile)
        if found <= 0.0:
            raise ConfigurationError(
                f"suggest: no ratios of gradient to weight{_since(first_step)}; record a run with "
                f"policy: measure, ratios: 1 (or every n-th step) and log: {{jsonl: ..., "
                f"per_parameter: true}}"
            )
        steps = sum(len(table) for table in tables)
        levels = np.percentile(ratios, CANDIDATES).tolist()
        return cls(
            threshold=found,
            configuration=f"policy: {{name: agc, clip_factor: {found:.3g}, unit: tensor}}",
            about=f"percentile {percentile:g} of {ratios.size} ratios in {steps} steps, median "
            f"{np.median(ratios):.3g}, largest {ratios.max():.3g}",
            steps=steps,
            clipped=_clipped(runs, chosen),
            spread=_spread(each),
            candidates=tuple(
                f"percentile {p:g}: clip_factor {level:.3g} clips {(ratios > level).mean():.1%} of "
                f"the gradients, something in {_steps_above(level, tables) / steps:.1%} of these "
                f"steps"
                for p, level in zip(CANDIDATES, levels, strict=True)
            ),
            what="ratios",
        )


def _ratios(run: Run, first_step: float) -> tuple[Values, Floats]:
    """``(steps, parameters)``, NaN where there is none; and the steps."""
    kept = run.parameters
    if kept is None or kept.ratios is None or kept.of_modules:
        return np.empty((0, 0), np.float32), np.empty(0)
    if kept.order != 2.0:
        raise ConfigurationError(
            f"suggest: the norms of {run.name} are of order {kept.order:g}, and AGC compares "
            f"2-norms; record a run with policy: measure, which measures those"
        )
    here = (kept.steps >= first_step) & ~np.isnan(kept.ratios).all(axis=1)
    norms, ratios = kept.norms[here], kept.ratios[here]
    with np.errstate(all="ignore"):  # no ratio in a step that has some: a weight of 0
        weights = np.where(np.isnan(ratios), 0.0, norms / ratios)
        found: Values = norms / np.maximum(weights, AGC_EPS).astype(np.float32)
    found[~(norms > 0.0)] = np.nan
    return found, kept.steps[here]


def _steps_above(level: float, tables: Sequence[Values]) -> int:
    return sum(int((table > level).any(axis=1).sum()) for table in tables)


def _percentile(values: Values, percentile: float) -> float:
    if not 0.0 < percentile <= 100.0:
        raise ConfigurationError(f"suggest: percentile must be in (0, 100], got {percentile!r}")
    return float(np.percentile(values, percentile)) if values.size else 0.0


def _since(first_step: float) -> str:
    return f" from step {first_step:g} on" if first_step else ""


def _clipped(runs: Sequence[Run], chosen: Sequence[npt.NDArray[np.bool_]]) -> float:
    return float(
        np.concatenate([run.clipped[here] for run, here in zip(runs, chosen, strict=True)]).mean()
    )


def _spread(values: Sequence[Values]) -> float:
    """The largest median by the smallest, of those that are above 0."""
    medians = [float(np.median(part)) for part in values if part.size]
    positive = [median for median in medians if median > 0.0 and math.isfinite(median)]
    return max(positive) / min(positive) if positive else 1.0
