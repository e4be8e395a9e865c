"""Recorded runs: read from JSONL, and summed up."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from distclip._foreign import clean, read_lines
from distclip.errors import ConfigurationError

Floats = npt.NDArray[np.float64]
PERCENTILES = (50, 90, 99)


@dataclass(frozen=True)
class Run:
    """The steps of one run in order, from a file that ``JsonlSink`` wrote.

    All arrays have one entry a step; NaN stands for what was not finite or not there.
    """

    name: str
    group: str
    steps: Floats
    total_norm: Floats
    clipped_norm: Floats
    coefficient: Floats
    threshold: Floats
    clipped_fraction: Floats
    skipped: npt.NDArray[np.bool_]
    nonfinite: npt.NDArray[np.bool_]

    @property
    def clipped(self) -> npt.NDArray[np.bool_]:
        """Whether something was clipped in each step."""
        clipped: npt.NDArray[np.bool_] = (self.coefficient < 1) | (self.clipped_fraction > 0)
        return clipped & ~self.skipped

    @property
    def threshold_is_norm(self) -> bool:
        """Whether ``threshold`` bounds the total norm, as for ``global_norm``.

        Other policies show a threshold in their own measure (AGC's is a ratio), which means
        nothing on an axis of norms. A record does not say which, but shows it.
        """
        bounded = self.clipped & np.isfinite(self.clipped_norm) & (self.threshold > 0)
        if bounded.any():
            with np.errstate(over="ignore"):
                ratio = self.clipped_norm[bounded] / self.threshold[bounded]
            return bool(np.median(np.abs(ratio - 1)) < 0.01)
        known = np.isfinite(self.total_norm) & np.isfinite(self.threshold)
        return bool(known.any() and (self.total_norm[known] <= self.threshold[known]).all())


@dataclass(frozen=True)
class Curve:
    """A quantity over the steps of one run, from a training log."""

    group: str
    steps: Floats
    values: Floats


def read_run(path: str | os.PathLike[str]) -> Run:
    """Read one JSONL file; of a step that was recorded twice, the last counts.

    Raises:
        ConfigurationError: no such file, or no line in it that a ``JsonlSink`` wrote.
    """
    records = _records(path, "total_norm")

    def column(key: str) -> Floats:
        return np.array([_at_least_zero(record.get(key)) for record in records])

    return Run(
        name=clean(_label(Path(path))),
        group=clean(group_of(path)),
        steps=np.array([_number(record["step"]) for record in records]),
        total_norm=column("total_norm"),
        clipped_norm=column("clipped_norm"),
        coefficient=column("coefficient"),
        threshold=column("threshold"),
        clipped_fraction=column("clipped_fraction"),
        skipped=np.array([record.get("skipped") is True for record in records]),
        nonfinite=np.array(
            [bool(record.get("nonfinite")) or record["total_norm"] is None for record in records]
        ),
    )


def read_loss(path: str | os.PathLike[str], group: str, key: str = "loss") -> Curve:
    """Read ``step`` and ``loss`` from a training log in JSONL."""
    records = _records(path, key)
    steps = np.array([_number(record["step"]) for record in records])
    return Curve(group, steps, np.array([_number(record[key]) for record in records]))


def group_of(path: str | os.PathLike[str]) -> str:
    """What the runs of one setting with different seeds have in common.

    ``agc_seed1.jsonl``, ``agc-s2.jsonl`` and ``agc/seed3.jsonl`` are all of the group ``agc``. A
    bare number at the end is a threshold as likely as a seed, and stays.
    """
    label = _label(Path(path))
    return re.sub(r"(?:^|[-_./])(?:seed|s)[-_]?\d+$", "", label, flags=re.IGNORECASE) or label


def _label(path: Path) -> str:
    """The name of the file, with that of its folder where it says too little by itself."""
    stem = path.stem
    generic = re.fullmatch(r"(?:clip|log|run|seed|s)?[-_]?\d*", stem, flags=re.IGNORECASE)
    folder = path.absolute().parent.name
    return f"{folder}/{stem}" if generic and folder else stem


def _records(path: str | os.PathLike[str], key: str) -> list[dict[str, Any]]:
    """The records that have a step and ``key``, by step.

    Lines that are torn, foreign or of another encoding are passed over.
    """
    records: dict[float, dict[str, Any]] = {}
    for line in read_lines(path):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):  # ValueError: a number of over 4,300 digits, too
            continue
        if isinstance(record, dict) and key in record:
            step = _number(record.get("step"))
            record.pop("parameters", None)  # not used here, and most of the record
            if math.isfinite(step):
                records[step] = record
    if not records:
        raise ConfigurationError(
            f"{clean(path)}: no line has the keys 'step' and {key!r}; expected JSONL such as "
            f'{{"step": 1, "{key}": 2.5}}'
        )
    return [records[step] for step in sorted(records)]


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.nan


def _at_least_zero(value: object) -> float:
    """A norm, a coefficient, a share: below 0 there is none."""
    number = _number(value)
    return number if number >= 0.0 else math.nan


# ---- summary ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Summary:
    """A run in a few numbers.

    ``percentiles`` and ``largest`` are of the norm before clipping. ``clipped`` is the share of the
    steps in which anything was clipped, ``share`` the mean share of the parameters that was: equal
    for ``global_norm``, while AGC may clip a little in every step.
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

    @classmethod
    def of(cls, run: Run) -> Summary:
        """Summarise a run."""
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
        )

    def advice(self) -> list[str]:
        """What the numbers suggest, after Google's tuning playbook; a sentence each."""
        advice = []
        if math.isfinite(self.percentiles[90]):
            advice.append(
                f"a threshold at the 90th percentile of the norms: "
                f"{configuration(self.percentiles[90])}"
            )
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


def configuration(max_norm: float) -> str:
    """The line of YAML that clips at this norm, to three digits."""
    return f"policy: {{name: global_norm, max_norm: {max_norm:.3g}}}"


@dataclass(frozen=True)
class Suggestion:
    """A threshold for the global norm, after Google's tuning playbook.

    ``max_norm`` is the asked percentile of the finite norms before clipping, of all runs together;
    ``clipped`` the share of these ``steps`` in which anything was clipped.
    """

    max_norm: float
    percentile: float
    steps: int
    median: float
    largest: float
    clipped: float

    @classmethod
    def of(
        cls, runs: Sequence[Run], percentile: float = 90.0, first_step: float = 0.0
    ) -> Suggestion:
        """Build from recorded runs.

        Args:
            runs: of one model, at the learning rate that is meant.
            percentile: in (0, 100].
            first_step: steps before it do not count.

        Raises:
            ConfigurationError: another percentile, or no norm that is finite and not zero.
        """
        if not 0.0 < percentile <= 100.0:
            raise ConfigurationError(f"suggest: percentile must be in (0, 100], got {percentile!r}")
        chosen = [np.isfinite(run.total_norm) & (run.steps >= first_step) for run in runs]
        norms = np.concatenate(
            [run.total_norm[here] for run, here in zip(runs, chosen, strict=True)]
        )
        clipped = np.concatenate(
            [run.clipped[here] for run, here in zip(runs, chosen, strict=True)]
        )
        found = float(np.percentile(norms, percentile)) if norms.size else 0.0
        if found <= 0.0:
            since = f" from step {first_step:g} on" if first_step else ""
            raise ConfigurationError(
                f"suggest: {norms.size} finite norms{since}, and no threshold above 0 in them; "
                f"give the log of a run that trains"
            )
        return cls(
            found,
            percentile,
            norms.size,
            float(np.median(norms)),
            float(norms.max()),
            float(clipped.mean()),
        )

    def __str__(self) -> str:
        return (
            f"percentile {self.percentile:g} of {self.steps} norms, median {self.median:.3g}, "
            f"largest {self.largest:.3g}"
        )
