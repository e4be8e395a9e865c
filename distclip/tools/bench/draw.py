"""The picture of a run of ``distclip bench``. Needs matplotlib (extra ``plot``)."""

from __future__ import annotations

import textwrap
from pathlib import Path

from distclip.monitor.plots import BEFORE, COLOURS, STYLE, backend
from distclip.tools.bench.record import Record, case_rows, is_ours

LABEL, TITLE = 48, 64
"""Characters of a line beside a bar, and above a panel, that the picture has room for."""


def save_chart(record: Record, path: Path) -> None:
    """One panel a case: bars are medians, whiskers quartiles, in ms.

    Raises:
        DistclipError: matplotlib is not installed.
    """
    matplotlib, figure_class = backend()
    tables = {name: case_rows(case) for name, case in record.cases.items()}
    heights = [1.3 + 0.34 * len(table) for table in tables.values()]
    with matplotlib.rc_context(STYLE):
        figure = figure_class(figsize=(11.0, sum(heights)), layout="constrained")
        panels = figure.subplots(len(tables), 1, squeeze=False, height_ratios=heights)[:, 0]
        for panel, (name, table) in zip(panels, tables.items(), strict=True):
            medians = [row.median_ms for row in table]
            spread = [
                [row.median_ms - row.low_ms for row in table],
                [row.high_ms - row.median_ms for row in table],
            ]
            colours = [COLOURS[0] if is_ours(row.name) else BEFORE for row in table]
            panel.barh(range(len(table)), medians, color=colours, xerr=spread, ecolor="#333333")
            panel.set_yticks(range(len(table)), [textwrap.fill(row.name, LABEL) for row in table])
            panel.invert_yaxis()
            panel.grid(visible=False, axis="y")
            for place, row in enumerate(table):
                told = f" {row.ratio:.2f}x" if row.ratio == row.ratio else ""
                panel.annotate(told, (row.high_ms, place), va="center", fontsize=8)
            panel.margins(x=0.1)
            case = record.cases[name]
            panel.set_title(textwrap.fill(case.title, TITLE))
            compared = case.peer in case.ways
            panel.set_xlabel(f"ms; x: times faster than {case.peer}" if compared else "ms")
        machine = record.machine
        figure.suptitle(
            f"distclip bench, {record.ranks} ranks, {machine['processor']}, {machine['date'][:10]}",
            x=0.01, ha="left", fontsize=12,
        )  # fmt: skip
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110)
