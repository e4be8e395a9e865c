"""What the sinks of all experiment trackers share: names, and that a failure ends no run."""

from __future__ import annotations

import importlib.util
import logging
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from distclip.common.exponents import from_log
from distclip.common.foreign import clean
from distclip.errors import DistclipError
from distclip.monitor.recording import RecordingSink
from distclip.monitor.states import States

if TYPE_CHECKING:
    from torch import Tensor

    from distclip.report import ClipReport

_logger = logging.getLogger("distclip.monitor")

FIELDS = {
    "total_norm": "grad_norm",
    "clipped_norm": "grad_norm_clipped",
    "coefficient": "clip_coefficient",
    "threshold": "clip_threshold",
    "clipped_fraction": "clipped_fraction",
    "skipped": "step_skipped",
    "noise_scale": "grad_noise_scale",
}
"""Field of a report -> its name in trackers."""

_EACH = {"norm": "grad_norm", "coefficient": "clip_coefficient", "ratio": "grad_weight_ratio"}


def metrics(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a record, under the names that trackers show.

    A threshold that the policy does not have is left out; a norm that is not finite is not.
    ``nonfinite`` is a number of parameters, ``grad_weight_ratio`` that of the whole model;
    ``grad_noise_scale`` is there where a ``RankNoiseScale`` follows the clipper.
    """
    found = {name: float(record[field]) for field, name in FIELDS.items() if field in record}
    if math.isnan(found["clip_threshold"]):
        del found["clip_threshold"]
    found["nonfinite"] = float(len(record["nonfinite"]))
    if weights := record.get("weight_norm"):
        found["grad_weight_ratio"] = record["total_norm"] / weights
    for dtype, each in record.get("exponents", {}).items():
        if (counted := from_log(dtype, each)) is not None and counted.elements:
            found[f"grad_zero/{dtype}"] = counted.zero / counted.elements
            found[f"grad_near_underflow/{dtype}"] = counted.near_underflow()
            found[f"grad_near_overflow/{dtype}"] = counted.near_overflow()
    for key in ("modules", "parameters"):
        for name, values in record.get(key, {}).items():
            found |= {f"{_EACH[field]}/{name}": value for field, value in values.items()}
    return found


def tensors(report: ClipReport) -> dict[str, Tensor]:
    """The same as 0-dim floating-point tensors, without the parameters; reads no host."""
    return {
        FIELDS.get(key, key): value if value.is_floating_point() else value.float()
        for key, value in report.tensors().items()
    }


class Tracker(Protocol):
    """One tracker's own calls; they may raise anything."""

    def open(self, first: int) -> None:
        """Start or find the run; ``first`` is the first step that comes."""

    def log(self, step: int, values: dict[str, float]) -> None:
        """Log the values of one step."""

    def close(self) -> None:
        """Write what is waiting, and end a run that was started here."""


class _Guarded:
    """Writes to a tracker, whose errors cost a record and not the training run."""

    def __init__(self, name: str, tracker: Tracker, prefix: str) -> None:
        self.lost = 0
        self._name, self._tracker, self._prefix = name, tracker, prefix
        self._opened = False

    def write(self, step: int, record: dict[str, Any], first: int) -> None:
        try:
            if not self._opened:
                self._tracker.open(first)
                self._opened = True
            values = {f"{self._prefix}{key}": value for key, value in metrics(record).items()}
            self._tracker.log(step, values)
        except Exception as error:
            self._lose(error)

    def end(self) -> None:
        if not self._opened:
            return
        try:
            self._tracker.close()
        except Exception as error:
            self._lose(error)

    def _lose(self, error: Exception) -> None:
        self.lost += 1
        if self.lost == 1:
            _logger.warning(
                "%s took no record (%s: %s); training goes on, and every record tries again",
                self._name, type(error).__name__, clean(error, 300),
            )  # fmt: skip


class TrackerSink(RecordingSink):
    """A sink that gives each record to a tracker.

    The values are ``grad_norm`` (before clipping), ``grad_norm_clipped``, ``clip_coefficient``,
    ``clip_threshold``, ``clipped_fraction``, ``step_skipped`` (0 or 1) and ``nonfinite`` (a number
    of parameters); under ``per_parameter`` also ``grad_norm/NAME`` and ``clip_coefficient/NAME``,
    and the same with the paths of modules where ``modules`` is set; ``grad_noise_scale`` where a
    :class:`RankNoiseScale` follows the clipper; ``grad_weight_ratio`` and
    ``grad_weight_ratio/NAME`` in steps that measure ``ratios``; the shares ``grad_zero/DTYPE``,
    ``grad_near_underflow/DTYPE`` and ``grad_near_overflow/DTYPE`` in steps that count
    ``exponents``.
    Only the main rank writes. What the tracker raises costs the record and not the run: a warning
    says so once, and ``lost`` counts.
    """

    _package = ""
    """What has to be installed, and the name of the extra."""

    def __init__(
        self,
        tracker: Tracker,
        every: int,
        per_parameter: bool,
        prefix: str,
        states: States | None,
    ) -> None:
        name = type(self).__name__
        if self._package and importlib.util.find_spec(self._package) is None:
            raise DistclipError(
                f"{name} needs {self._package}, which is not installed: "
                f"pip install 'distclip[{self._package}]'"
            )
        super().__init__(_Guarded(name, tracker, prefix), every, per_parameter, states)
