"""The log as a file: one JSON object a line."""

from __future__ import annotations

import json
import logging
import math
import os
import secrets
import time
from pathlib import Path
from typing import Any

from distclip.common.foreign import in_one_line
from distclip.errors import ConfigurationError
from distclip.monitor.lines import LineFile
from distclip.monitor.recording import RecordingSink
from distclip.monitor.states import States

_logger = logging.getLogger("distclip.monitor")


class JsonlSink(RecordingSink):
    """One JSON object a line: ``{"step": 10, "state": "normal", "total_norm": 1.7, ...}``.

    Only the main rank writes; the others never even read the report. Every line is written through
    to the file at once, so a crash loses none (on an accelerator, where a record is written one
    step late, at most one).

    An existing file is appended to. A clipper that goes on from a checkpoint, so that its first
    step is not 0, continues the ``run`` that the file ends with: steps that were run twice are
    there twice, and the readers in ``distclip.monitor`` take the last. One that starts at step 0
    gets a ``run`` of its own, and a line in the log ``distclip.monitor`` says so if there are
    others in the file; the readers keep them apart.

    A file that cannot be written (a full disk, a folder that is gone or may not be written to)
    does not end a training run. A warning in the log ``distclip.monitor`` says so once, every later
    record tries again, and ``lost`` counts those that were not written. A record is in the file
    whole or not at all.

    Args:
        path: the file; its folder is made. Relative to the working directory at the first line.
        every: write the steps that are divisible by it.
        per_parameter: with each parameter's norm and coefficient.
        states: see :class:`distclip.monitor.States`.

    Raises:
        ConfigurationError: ``every < 1``, or a path with a NUL character.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        every: int = 1,
        per_parameter: bool = False,
        states: States | None = None,
    ) -> None:
        if "\0" in os.fspath(path):
            raise ConfigurationError(
                f"JsonlSink: {in_one_line(path)} is no path: it has a NUL character"
            )
        self.path = Path(path)
        super().__init__(_Lines(self.path), every, per_parameter, states)

    def __repr__(self) -> str:
        return f"JsonlSink({str(self.path)!r})"


class _Lines:
    """Writes records as lines, each with the name of its run."""

    def __init__(self, path: Path) -> None:
        self._file = LineFile(path)
        self._run: str | None = None

    @property
    def lost(self) -> int:
        return self._file.lost

    def write(self, step: int, record: dict[str, Any], first: int) -> None:
        if self._run is None:
            self._run = _run_of(self._file.path, first)
        line = {"step": step, "run": self._run, **record}
        self._file.append(json.dumps(_json(line), allow_nan=False))

    def end(self) -> None:
        self._file.end()


def _run_of(path: Path, first: int) -> str:
    """The run that the file ends with, where this goes on with it; else a new name."""
    last = _last_record(path)
    if first > 0 and isinstance(last.get("run"), str):
        return str(last["run"])
    new = time.strftime("%Y%m%d-%H%M%S", time.gmtime()) + f"-{secrets.token_hex(2)}"
    if last and first == 0:
        _logger.warning(
            "the log %s has records of an earlier run; those of this one, which starts at step 0, "
            "have \"run\": \"%s\"", in_one_line(path), new,
        )  # fmt: skip
    return new


def _last_record(path: Path) -> dict[str, Any]:
    """The last whole record of a file; empty where there is none, or it cannot be read."""
    try:
        if not path.is_file():
            return {}
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            for tail in (2**16, 2**26):  # a record with 5,000 parameters has some 500 kB
                file.seek(max(size - tail, 0))
                for line in reversed(file.read().splitlines()):
                    record = _step_record(line)
                    if record:
                        return record
                if tail >= size:
                    break
    except (OSError, ValueError):
        pass
    return {}


def _step_record(line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) and "step" in record else {}


def _json(value: Any) -> Any:
    """``value`` with null for NaN and inf, which JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json(item) for item in value]
    return value
