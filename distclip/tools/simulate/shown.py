"""What ``distclip simulate`` shows: a table, findings, JSON."""

from __future__ import annotations

import dataclasses
import json
import math
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from rich.console import Console
from rich.table import Table

from distclip._version import __version__
from distclip.common.foreign import clean_lines
from distclip.tools.simulate.agreement import QUANTITIES, StepRow, agree, step_rows
from distclip.tools.simulate.findings import Finding
from distclip.tools.simulate.watch import Ending

EDGE = 3
"""Steps shown at the beginning and the end of a long run."""


@dataclass
class LayoutOutcome:
    """One layout: how it ended and what is wrong."""

    layout: str
    ending: Ending
    findings: list[Finding] = field(default_factory=list)
    rows: list[StepRow] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rows = step_rows(self.ending.ranks)

    @property
    def sound(self) -> bool:
        """Whether nothing is wrong."""
        return not any(finding.fault for finding in self.findings)


def outcomes_table(outcomes: Sequence[LayoutOutcome], tolerance: float) -> Table:
    """A line for each step of each layout; a star where a number is not that of the first."""
    several = len(outcomes) > 1
    title = f"* not that of {outcomes[0].layout} to {tolerance:g}" if several else None
    result = Table(title=title)
    result.add_column("step", justify="right")
    result.add_column("layout")
    for quantity in QUANTITIES:
        result.add_column(quantity, justify="right")
    count = max((len(outcome.rows) for outcome in outcomes), default=0)
    edge = EDGE if several else 2 * EDGE
    shown = [n for n in range(count) if n < edge or n >= count - edge]
    shown += [n for n in range(count) if n not in shown and _differs(outcomes, n, tolerance)][:EDGE]
    before = -1
    for number in sorted(shown):
        if number != before + 1:
            result.add_row("...", end_section=True)
        before = number
        for place, outcome in enumerate(outcomes):
            cells = _cells(outcomes[0], outcome, number, tolerance)
            last = several and place == len(outcomes) - 1
            result.add_row("" if place else str(number), outcome.layout, *cells, end_section=last)
    return result


def _differs(outcomes: Sequence[LayoutOutcome], number: int, tolerance: float) -> bool:
    return any(
        "*" in cell
        for outcome in outcomes
        for cell in _cells(outcomes[0], outcome, number, tolerance)
    )


def _cells(
    first: LayoutOutcome, outcome: LayoutOutcome, number: int, tolerance: float
) -> list[str]:
    if number >= len(outcome.rows):
        return [""] * len(QUANTITIES)
    cells = []
    for quantity in QUANTITIES:
        value = getattr(outcome.rows[number], quantity)
        wanted = getattr(first.rows[number], quantity) if number < len(first.rows) else value
        star = "" if agree(wanted, value, tolerance) else "*"
        cells.append(("-" if math.isnan(value) else f"{value:.7g}") + star)
    return cells


def show_outcomes(outcomes: Sequence[LayoutOutcome], tolerance: float, console: Console) -> None:
    """Print the whole result for a reader."""
    if any(outcome.rows for outcome in outcomes):
        console.print(outcomes_table(outcomes, tolerance))
    for outcome in outcomes:
        for finding in outcome.findings:
            style = "red" if finding.fault else "yellow"
            console.print(
                clean_lines(f"{outcome.layout}: {finding.text}"), style=style, markup=False,
                highlight=False, soft_wrap=True,
            )  # fmt: skip
            if finding.detail:
                detail = clean_lines(finding.detail)
                console.print(detail, markup=False, highlight=False, soft_wrap=True)
        console.print(_summary(outcome), markup=False, highlight=False, soft_wrap=True)


def _summary(outcome: LayoutOutcome) -> str:
    ending = outcome.ending
    state = "sound" if outcome.sound else "WRONG"
    where = ""
    if ending.isolated is not None:
        own = "each in a network namespace of its own"
        where = f", nodes {own if ending.isolated else 'on one loopback interface (no namespaces)'}"
    return (
        f"{outcome.layout}: {state}; {len(outcome.rows)} steps on {len(ending.ranks)} rank(s)"
        f"{where}, {ending.seconds:.1f} s"
    )


def outcomes_as_json(outcomes: Sequence[LayoutOutcome], tolerance: float) -> str:
    """Everything, for other programs; null for what is not known or not finite."""
    layouts = [
        {
            "layout": outcome.layout,
            "ended": outcome.ending.how,
            "sound": outcome.sound,
            "ranks": len(outcome.ending.ranks),
            "steps_by_rank": [rank.done for rank in outcome.ending.ranks],
            "isolated_nodes": outcome.ending.isolated,
            "seconds": round(outcome.ending.seconds, 2),
            "steps": [_finite(dataclasses.asdict(row)) for row in outcome.rows],
            "findings": [dataclasses.asdict(finding) for finding in outcome.findings],
        }
        for outcome in outcomes
    ]
    document = {
        "distclip": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "tolerance": tolerance,
        "sound": all(outcome.sound for outcome in outcomes),
        "layouts": layouts,
    }
    return json.dumps(document, indent=1, allow_nan=False) + "\n"


def _finite(row: dict[str, float]) -> dict[str, float | None]:
    return {key: value if math.isfinite(value) else None for key, value in row.items()}
