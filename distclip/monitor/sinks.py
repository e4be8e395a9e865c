"""Where the report of each step goes.

A sink is any callable ``sink(step, report)``; ``GradClipper(..., sinks=[...])`` calls each of them
after every step, on every rank.
"""

from __future__ import annotations

import json
import math
import os
import weakref
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, TypeAlias

from distclip._foreign import clean
from distclip.errors import ConfigurationError
from distclip.monitor.lines import LineFile


class Report(Protocol):
    """What a sink reads of a ``ClipReport``."""

    def to_dict(self, *, per_parameter: bool = True) -> dict[str, Any]:
        """Plain numbers; waits for the device, starts no collective."""


Sink: TypeAlias = Callable[[int, Report], object]


class JsonlSink:
    """One JSON object a line: ``{"step": 10, "total_norm": 1.7, ...}``.

    Only the main rank writes; the others never even read the report. An existing file is appended
    to, so that a run resumed from a checkpoint keeps the lines from before: steps that were run
    twice are there twice, and the readers in ``distclip.monitor`` take the last. Give each run a
    file of its own. Every line is written through to the file at once, so a crash loses none.

    A file that cannot be written (a full disk, a folder that is gone or may not be written to)
    does not end a training run. A warning in the log ``distclip.monitor`` says so once, every later
    record tries again, and ``lost`` counts those that were not written. A record is in the file
    whole or not at all.

    Args:
        path: the file; its folder is made. Relative to the working directory at the first line.
        every: write the steps that are divisible by it; reading a report waits for the device.
        per_parameter: with each parameter's norm and coefficient.

    Raises:
        ConfigurationError: ``every < 1``, or a path with a NUL character.
    """

    def __init__(
        self, path: str | os.PathLike[str], every: int = 1, per_parameter: bool = False
    ) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ConfigurationError(f"JsonlSink: every must be an integer >= 1, got {every!r}")
        if "\0" in os.fspath(path):
            raise ConfigurationError(f"JsonlSink: {clean(path)} is no path: it has a NUL character")
        self.path = Path(path)
        self.every = every
        self.per_parameter = per_parameter
        self._log = LineFile(self.path)
        self._end = weakref.finalize(self, self._log.end)
        self._closed = False

    @property
    def lost(self) -> int:
        """How many records could not be written."""
        return self._log.lost

    def __call__(self, step: int, report: Report) -> None:
        """Write the report of a step, where it is this step's and this rank's turn."""
        from distclip.statistics import collectives  # imports torch, which a report is read without

        if step % self.every or not collectives.is_first():
            return
        if self._closed:
            raise ValueError(f"JsonlSink({str(self.path)!r}) is closed")
        record = {"step": step, **report.to_dict(per_parameter=self.per_parameter)}
        self._log.append(json.dumps(_json(record), allow_nan=False))

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        self._closed = True
        self._end()

    def __enter__(self) -> JsonlSink:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _json(value: Any) -> Any:
    """``value`` with null for NaN and inf, which JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json(item) for item in value]
    return value
