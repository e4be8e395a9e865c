"""Recorded runs."""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from distclip.common.exponents import Exponents
from distclip.common.foreign import in_one_line
from distclip.common.rollups import Floats as Floats
from distclip.common.rollups import joint
from distclip.monitor.states import STATES, judged
from distclip.monitor.thinning import sparkline

BINADES = 4
"""How near to underflow or overflow is near."""


@dataclass(frozen=True)
class ParameterSeries:
    """Norms and coefficients of each parameter, where a log has them; of every n-th step if many.

    Of each module, where a log has only those.

    Attributes:
        names: of the parameters.
        steps: ``(steps,)``.
        norms: float32 ``(steps, parameters)``, before clipping; NaN where not finite or not there.
        coefficients: float32 ``(steps, parameters)``.
        ratios: float32 ``(steps, parameters)``, of gradient to weight; None where a log has none.
        of_modules: whether these are modules, and not parameters.
        order: of the norms.
    """

    names: list[str]
    steps: Floats
    norms: npt.NDArray[np.float32]
    coefficients: npt.NDArray[np.float32]
    ratios: npt.NDArray[np.float32] | None = None
    of_modules: bool = False
    order: float = 2.0

    def rolled_up(self, groups: Mapping[str, list[int]]) -> ParameterSeries:
        """Norms, coefficients and ratios of groups of parameters."""
        size = len(self.steps), len(groups)
        norms, coefficients = np.empty(size, np.float32), np.empty(size, np.float32)
        ratios = None if self.ratios is None else np.empty(size, np.float32)
        with np.errstate(all="ignore"):
            for number, places in enumerate(groups.values()):
                each = self.norms[:, places].astype(np.float64)
                whole = norms[:, number] = _joint(each, self.order)
                after = _joint(each * self.coefficients[:, places], self.order)
                coefficients[:, number] = np.where(whole > 0.0, after / whole, 1.0)
                if ratios is not None and self.ratios is not None:
                    ratios[:, number] = whole / _joint(each / self.ratios[:, places], self.order)
        for each in (coefficients, *(() if ratios is None else (ratios,))):
            each[np.isnan(norms)] = np.nan
        return ParameterSeries(
            list(groups), self.steps, norms, coefficients, ratios, of_modules=True, order=self.order
        )


@dataclass
class Counted:
    """What a log says of the binary exponents of the gradients of one dtype.

    Attributes:
        last: of the last line.
        nearest: parameter -> share near underflow, of the last line.
        steps: in the order of the lines, as the shares are.
        zero: share of the elements that are 0.
        underflow: share that is subnormal, or within ``BINADES`` of it.
        overflow: share within ``BINADES`` of overflow.
    """

    last: Exponents
    nearest: dict[str, float] = field(default_factory=dict)
    steps: array[float] = field(default_factory=lambda: array("d"))
    zero: array[float] = field(default_factory=lambda: array("d"))
    underflow: array[float] = field(default_factory=lambda: array("d"))
    overflow: array[float] = field(default_factory=lambda: array("d"))

    def add(self, step: float, found: Exponents, nearest: object) -> None:
        """Add a line; ``nearest`` may be anything."""
        self.last = found
        self.steps.append(step)
        self.zero.append(found.zero / max(found.elements, 1))
        self.underflow.append(found.near_underflow(BINADES))
        self.overflow.append(found.near_overflow(BINADES))
        pairs = [*nearest.items()][:3] if isinstance(nearest, dict) else []
        self.nearest = {
            in_one_line(k, 200): v for k, v in pairs if isinstance(v, float) and 0 <= v <= 1
        }

    def shares(self) -> list[str]:
        """The counts of the last recorded step, in words."""
        found = [
            f"gradients in {self.last.dtype} at step {self.steps[-1]:g}: {self.zero[-1]:.2%} zero, "
            f"{self.underflow[-1]:.2%} within {BINADES} binades of underflow, "
            f"{self.overflow[-1]:.2%} of overflow"
        ]
        if self.nearest:
            listed = ", ".join(f"{name} {share:.2%}" for name, share in self.nearest.items())
            found.append(f"nearest to underflow: {listed}")
        return found

    def lines(self) -> list[str]:
        """For a terminal: the same, with sparklines."""
        found = self.shares()
        used = np.flatnonzero(self.last.counts)
        if used.size:
            first, last = used[0], used[-1]
            shape = sparkline(self.last.counts[first : last + 1].astype(float), 256)
            found.append(
                f"exponents {self.last.lowest + first} {shape} {self.last.lowest + last}, log scale"
            )
        if any(self.underflow[:-1]):
            line = sparkline(np.array(self.underflow))
            found.append(f"near underflow {line} up to {max(self.underflow):.2%}, log scale")
        return found


def median(values: npt.NDArray[Any]) -> float:
    """The median of those that are there; NaN where none is."""
    known = values[~np.isnan(values)]
    return float(np.median(known)) if known.size else math.nan


def _joint(norms: Floats, order: float) -> Floats:
    """The joint norm of those that are there; NaN where none is."""
    whole = joint(np.nan_to_num(norms, nan=0.0, posinf=0.0), order)
    whole[np.isnan(norms).all(axis=1)] = np.nan
    return whole


@dataclass(frozen=True)
class Run:
    """The steps of one run in order, from a file that ``JsonlSink`` wrote.

    All arrays have one entry a step; NaN stands for what was not finite or not there.
    ``state_codes`` are indices into ``STATES``, 255 where the log has none. ``first_bad`` is the
    first step with NaN or inf, and the parameters that had it. ``exponents`` are by dtype.
    """

    name: str
    group: str
    steps: Floats
    total_norm: Floats
    clipped_norm: Floats
    coefficient: Floats
    threshold: Floats
    clipped_fraction: Floats
    noise_scale: Floats
    skipped: npt.NDArray[np.bool_]
    nonfinite: npt.NDArray[np.bool_]
    state_codes: npt.NDArray[np.uint8]
    first_bad: tuple[float, tuple[str, ...]] | None = None
    parameters: ParameterSeries | None = None
    exponents: Mapping[str, Counted] = field(default_factory=dict)

    @cached_property
    def states(self) -> npt.NDArray[np.uint8]:
        """Index into ``STATES`` for each step; judged now where the log has none."""
        if (self.state_codes < len(STATES)).all():
            return self.state_codes
        found = judged(self.total_norm, self.nonfinite)
        return np.fromiter(map(STATES.index, found), np.uint8, len(found))

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


def configuration(max_norm: float) -> str:
    """The line of YAML that clips at this norm, to three digits."""
    return f"policy: {{name: global_norm, max_norm: {max_norm:.3g}}}"
