"""Recorded runs, read from files that may hold anything.

A file is read line by line, and only numbers are kept. What is torn, foreign or of another encoding
is passed over. The norms of all parameters, most of a file that has them, are read of every line up
to ``PARSED`` bytes of file, and of every n-th line in a larger one.
"""

from __future__ import annotations

import json
import math
import os
import re
from array import array
from pathlib import Path
from typing import Any

import numpy as np

from distclip.common.exponents import from_log
from distclip.common.foreign import in_one_line, read_lines
from distclip.errors import ConfigurationError
from distclip.monitor.runs import Counted, Curve, Floats, ParameterSeries, Run
from distclip.monitor.states import STATES
from distclip.monitor.tracking import TRACKED_FIELDS

PARSED = 400_000_000
_BEFORE_PARAMETERS = b', "parameters": {'
_CODES: dict[str, int] = {state: code for code, state in enumerate(STATES)}
_THREE = ("norm", "coefficient", "ratio")
_TWO = _THREE[:2]
_COLUMNS = (
    "total_norm",
    "clipped_norm",
    "coefficient",
    "threshold",
    "clipped_fraction",
    "noise_scale",
)


def read_runs(path: str | os.PathLike[str]) -> list[Run]:
    """The runs of one JSONL file, in the order in which they began.

    Reads the names that a ``JsonlSink`` writes, and those of trackers (``grad_norm``). Of a step
    that a run has twice, the last counts.

    Raises:
        ConfigurationError: the file cannot be read, or no line has a step and a norm.
    """
    size = os.path.getsize(path) if os.path.isfile(path) else 0
    stride = -(-size // PARSED) or 1
    found: dict[str | None, _Columns] = {}
    for number, line in enumerate(read_lines(path)):
        record = _parsed(line, whole=number % stride == 0)
        if record is None or not _is_norm(record.get("total_norm", record.get("grad_norm", ""))):
            continue
        step = _number(record.get("step"))
        if not math.isfinite(step):
            continue
        name = record.get("run")
        key = name if isinstance(name, str) else None
        if key not in found:
            found[key] = _Columns()
        found[key].add(step, record)
    if not found:
        raise _nothing(path, "total_norm")
    label, group = in_one_line(_label(Path(path))), in_one_line(setting_of(path))
    runs = []
    for position, columns in enumerate(found.values()):
        more = f" #{position + 1}" if len(found) > 1 else ""
        runs.append(columns.run(label + more, group + more))
    return runs


def read_run(path: str | os.PathLike[str]) -> Run:
    """The newest run of one JSONL file.

    Raises:
        ConfigurationError: as :func:`read_runs`.
    """
    return read_runs(path)[-1]


def read_loss(path: str | os.PathLike[str], group: str, key: str = "loss") -> Curve:
    """Read ``step`` and ``loss`` from a training log in JSONL; of a step, the last counts."""
    found: dict[float, float] = {}
    for line in read_lines(path):
        record = _parsed(line, whole=True)
        if record is not None and key in record:
            step = _number(record.get("step"))
            if math.isfinite(step):
                found[step] = _number(record[key])
    if not found:
        raise _nothing(path, key)
    steps = sorted(found)
    return Curve(group, np.array(steps), np.array([found[step] for step in steps]))


class _Columns:
    """What is kept of the records of one run, in the order of the lines."""

    def __init__(self) -> None:
        self.steps = array("d")
        self.values = [array("d") for _ in _COLUMNS]
        self.skipped, self.bad, self.states = bytearray(), bytearray(), bytearray()
        self.first_bad: tuple[float, tuple[str, ...]] | None = None
        self.names: dict[str, int] = {}
        self.exponents: dict[str, Counted] = {}
        self.each = "modules"
        """The key of the norms that are kept: of modules where there are none of parameters."""
        self.order = 2.0
        self.rows: list[tuple[int, Any, Any]] = []
        """Position of a line; places of its parameters; norms, coefficients and ratios."""

    def add(self, step: float, record: dict[str, Any]) -> None:
        self.steps.append(step)
        for name, column in zip(_COLUMNS, self.values, strict=True):
            value = record[name] if name in record else record.get(TRACKED_FIELDS[name])
            column.append(_at_least_zero(value))
        skipped = record.get("skipped", record.get("step_skipped"))
        self.skipped.append(skipped is True or skipped == 1)
        nonfinite = record.get("nonfinite")
        norm = record.get("total_norm", record.get("grad_norm", 0.0))
        bad = bool(nonfinite) or not math.isfinite(_number(norm))
        self.bad.append(bad)
        if bad and (self.first_bad is None or step < self.first_bad[0]):
            names = nonfinite if isinstance(nonfinite, list) else []
            self.first_bad = (step, tuple(in_one_line(name, 200) for name in names[:100]))
        state = record.get("state")
        self.states.append(_CODES.get(state, 255) if isinstance(state, str) else 255)
        exponents = record.get("exponents")
        for dtype, each in exponents.items() if isinstance(exponents, dict) else ():
            found = from_log(dtype, each)
            if found is not None:
                counted = self.exponents.setdefault(found.dtype, Counted(found))
                counted.add(step, found, each.get("nearest"))
        self.order = _order(record.get("norm_type"))
        if "parameters" in record:
            self.each = "parameters"
        parameters = record.get(self.each)
        if isinstance(parameters, dict) and parameters:
            self._add_parameters(parameters)

    def _add_parameters(self, parameters: dict[str, Any]) -> None:
        known = self.names
        try:
            fields = _THREE if "ratio" in next(iter(parameters.values())) else _TWO
            row = np.array(
                [[entry[field] for entry in parameters.values()] for field in fields], np.float32
            )
        except (TypeError, KeyError, ValueError, OverflowError):
            return
        places = [known.setdefault(name, len(known)) for name in parameters]
        self.rows.append((len(self.steps) - 1, places, row))

    def run(self, name: str, group: str) -> Run:
        steps = np.frombuffer(self.steps)
        # Of a step that is there twice the last counts: the first in the reversed order.
        unique, first = np.unique(steps[::-1], return_index=True)
        order = len(steps) - 1 - first
        values = dict(zip(_COLUMNS, (np.frombuffer(v)[order] for v in self.values), strict=True))
        return Run(
            name=name,
            group=group,
            steps=unique,
            **values,
            skipped=np.frombuffer(self.skipped, np.bool_)[order],
            nonfinite=np.frombuffer(self.bad, np.bool_)[order],
            state_codes=np.frombuffer(self.states, np.uint8)[order],
            first_bad=self.first_bad,
            parameters=self._parameters(steps, order),
            exponents=self.exponents,
        )

    def _parameters(self, steps: Floats, order: Any) -> ParameterSeries | None:
        kept = np.zeros(len(steps), np.bool_)
        kept[order] = True
        rows = sorted((row for row in self.rows if kept[row[0]]), key=lambda row: steps[row[0]])
        if not rows:
            return None
        fields = max(len(row) for *_, row in rows)
        tables = np.full((fields, len(rows), len(self.names)), np.nan, np.float32)
        for number, (_, places, row) in enumerate(rows):
            tables[: len(row), number, places] = row
        tables[~np.isfinite(tables) | (tables < 0.0)] = np.nan
        return ParameterSeries(
            [in_one_line(name, 300) for name in self.names],
            steps[[row[0] for row in rows]],
            norms=tables[0],
            coefficients=tables[1],
            ratios=tables[2] if len(tables) > 2 else None,
            of_modules=self.each == "modules",
            order=self.order,
        )


def _parsed(line: bytes, whole: bool) -> dict[str, Any] | None:
    """The record of a line, without its parameters unless ``whole``; None where there is none."""
    try:
        if not whole and (at := line.find(_BEFORE_PARAMETERS, 0, 2**20)) > 0:
            try:
                record = json.loads(line[:at] + b"}")
            except ValueError:  # it was inside something else
                record = json.loads(line)
        else:
            record = json.loads(line)
    except (ValueError, RecursionError):  # ValueError: a number of over 4,300 digits, too
        return None
    return record if isinstance(record, dict) else None


def setting_of(path: str | os.PathLike[str]) -> str:
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


def _nothing(path: str | os.PathLike[str], key: str) -> ConfigurationError:
    return ConfigurationError(
        f"{in_one_line(path)}: no line has the keys 'step' and {key!r}; expected JSONL such as "
        f'{{"step": 1, "{key}": 2.5}}'
    )


def _is_norm(value: object) -> bool:
    """Whether it is a number, or null, which stands for NaN and inf."""
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.nan


def _order(value: object) -> float:
    """Of norms: 2 where a record says nothing that could be one."""
    order = math.inf if value == "inf" else _number(value)
    return order if order > 0.0 else 2.0


def _at_least_zero(value: object) -> float:
    """A norm, a coefficient, a share: below 0 there is none."""
    number = _number(value)
    return number if number >= 0.0 else math.nan
