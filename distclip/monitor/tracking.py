"""What the sinks of all experiment trackers share: names, and that a failure ends no run."""

from __future__ import annotations

import importlib.util
import logging
import math
import os
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from distclip.common.exponents import from_log
from distclip.common.foreign import in_one_line
from distclip.errors import DistclipError
from distclip.monitor.background import MOST_WAITING, Background, within_patience
from distclip.monitor.recording import RecordingSink
from distclip.monitor.states import States

if TYPE_CHECKING:
    from torch import Tensor

    from distclip.report import ClipReport

_logger = logging.getLogger("distclip.monitor")

TRACKED_FIELDS = {
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
    found = {
        name: float(record[field]) for field, name in TRACKED_FIELDS.items() if field in record
    }
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
    """The metrics of a report as 0-dim floating-point tensors, without those of parameters.

    Reads no host.
    """
    return {
        TRACKED_FIELDS.get(key, key): value if value.is_floating_point() else value.float()
        for key, value in report.tensors().items()
    }


class Tracker(Protocol):
    """One tracker's own calls; they may raise anything.

    Attributes:
        waits: whether ``log`` waits for another process, and so is called by a thread.
    """

    waits: bool

    def open(self, first: int) -> None:
        """Start or find the run; ``first`` is the first step that comes."""

    def log(self, step: int, values: dict[str, float]) -> None:
        """Log the values of one step."""

    def close(self) -> None:
        """Write what is waiting, and end a run that was started here."""


class _Guarded:
    """Writes to a tracker, whose errors cost a record and not the training run.

    A tracker that cannot be opened, which may take long to find out, is tried again after 1, 3, 7
    and more records.
    """

    LONGEST = 1023
    """Records from one attempt to open to the next."""

    def __init__(self, name: str, tracker: Tracker, prefix: str) -> None:
        self.lost = 0
        self._name, self._tracker, self._prefix = name, tracker, prefix
        self._process = 0
        """That has opened the tracker; a fork of it leaves the tracker alone."""
        self._counting = threading.Lock()
        self._pause = self._left = 0
        self._background = Background(self._log) if tracker.waits else None

    def write(self, step: int, record: dict[str, Any], first: int) -> None:
        if not self._process and not self._open(first):
            return
        values = {f"{self._prefix}{key}": value for key, value in metrics(record).items()}
        if self._background is None:
            self._log(step, values)
        elif not self._background.put(step, values):
            self._lose(f"{MOST_WAITING} records are waiting for it")

    def end(self) -> None:
        if self._process != os.getpid():
            return
        if self._background is not None and (left := self._background.drain()):
            self._lose(f"it does not answer, and {left} records are left", left)
            within_patience(self._close)
        else:
            self._close()

    def _close(self) -> None:
        try:
            self._tracker.close()
        except Exception as error:
            self._lose(f"{type(error).__name__}: {error}")

    def _open(self, first: int) -> bool:
        if self._left:
            self._left -= 1
            self.lost += 1
            return False
        try:
            self._tracker.open(first)
        except Exception as error:
            self._left = self._pause = min(2 * self._pause + 1, self.LONGEST)
            self._lose(f"{type(error).__name__}: {error}")
            return False
        self._process = os.getpid()
        return True

    def _log(self, step: int, values: dict[str, float]) -> None:
        try:
            self._tracker.log(step, values)
        except Exception as error:
            self._lose(f"{type(error).__name__}: {error}")

    def _lose(self, why: str, records: int = 1) -> None:
        with self._counting:
            told, self.lost = self.lost > 0, self.lost + records
        if not told:
            _logger.warning(
                "%s took no record (%s); training goes on, and later records try again",
                self._name, in_one_line(why, 300),
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
    """Package that has to be installed, and the extra that brings it."""

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
