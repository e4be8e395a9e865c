"""Summaries as a table: drawn in a terminal, plain columns in a file or a pipe."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TextIO

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from distclip.common.rollups import grouped
from distclip.monitor.runs import Run, median
from distclip.monitor.summary import PERCENTILES, Summary

HEADER = (
    "run",
    "steps",
    *(f"norm p{p}" for p in PERCENTILES),
    "largest",
    "threshold",
    "steps clipped",
    "share clipped",
    "skipped",
    "NaN/inf",
)

MODULES = ("module", "median norm", "largest", "steps clipped", "median gradient/weight")


def show_runs(
    summaries: Sequence[Summary], file: TextIO | None = None, *, terminal: bool | None = None
) -> None:
    """Write the table, and below it the advice for each run."""
    console = Console(
        file=file, highlight=False, soft_wrap=True, emoji=False, force_terminal=terminal
    )
    rows = [_row(summary) for summary in summaries]
    if console.is_terminal:
        lines = [HEADER, *rows]
        # A row a run where that fits; else a column a run, so that no number is cut off.
        wide = sum(max(map(len, column)) + 3 for column in zip(*lines, strict=True)) + 1
        if wide > console.width:
            lines = list(zip(*lines, strict=True))
        table = Table(title="Gradient norms before clipping")
        for index, heading in enumerate(lines[0]):
            table.add_column(Text(heading), justify="right" if index else "left", overflow="fold")
        for row in lines[1:]:
            table.add_row(*map(Text, row))
        console.print(table, soft_wrap=False)
    else:
        for line in _columns([HEADER, *rows]):
            console.print(line, markup=False)
    for summary in summaries:
        console.print(f"\n{summary.name}:", markup=False)
        if summary.sparkline:
            console.print(
                f"  norm {summary.sparkline} {_short(summary.smallest)} to "
                f"{_short(summary.largest)}, log scale, x: NaN or inf",
                markup=False,
            )
        states = ", ".join(f"{name} {count}" for name, count in summary.states.items())
        console.print(
            f"  steps by state: {states}; spike score {_short(summary.spike_score)}%",
            markup=False,
        )
        if summary.noise_scale is not None:
            console.print(
                "  gradient noise scale {:.3g} samples at step {:g}".format(*summary.noise_scale),
                markup=False,
            )
        for line in summary.exponents:
            console.print(f"  {line}", markup=False)
        for sentence in summary.advice():
            console.print(f"  - {sentence}", markup=False)


def show_modules(runs: Sequence[Run], depth: int, file: TextIO | None = None) -> None:
    """Write a table of modules for each run: norms and ratios of all their parameters together."""
    console = Console(file=file, highlight=False, soft_wrap=True, emoji=False)
    for run in runs:
        if run.parameters is None:
            console.print(
                f"\n{run.name}: no norms of parameters; log them with per_parameter: true, or with "
                f"modules: {depth}", markup=False,
            )  # fmt: skip
            continue
        rolled = run.parameters.rolled_up(grouped(run.parameters.names, depth))
        console.print(f"\n{run.name}, by module:", markup=False)
        rows = [MODULES]
        for place, name in enumerate(rolled.names):
            norms, coefficients = rolled.norms[:, place], rolled.coefficients[:, place]
            ratio = math.nan if rolled.ratios is None else median(rolled.ratios[:, place])
            clipped = (coefficients < 1.0).sum() / max((~np.isnan(coefficients)).sum(), 1)
            known = norms[~np.isnan(norms)]
            rows.append((
                name, _short(median(norms)), _short(known.max() if known.size else math.nan),
                f"{clipped:.1%}", _short(ratio),
            ))  # fmt: skip
        for line in _columns(rows):
            console.print(line, markup=False)


def _row(summary: Summary) -> tuple[str, ...]:
    return (
        summary.name,
        str(summary.steps),
        *(_short(summary.percentiles[p]) for p in PERCENTILES),
        _short(summary.largest),
        _short(summary.threshold),
        f"{summary.clipped:.1%}",
        "-" if math.isnan(summary.share) else f"{summary.share:.1%}",
        str(summary.skipped),
        str(summary.nonfinite),
    )


def _short(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3g}"


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *rest in rows:
        cells = [first.ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
        lines.append("  ".join(cells))
    return lines
