"""The newest records of a log, followed while a run goes on, in the terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from distclip.common.foreign import in_one_line
from distclip.monitor.reading import read_run
from distclip.monitor.runs import Run
from distclip.monitor.states import STATES
from distclip.monitor.summary import Summary
from distclip.monitor.thinning import sparkline

STEPS_SHOWN = 8
"""How many of the newest steps the table shows."""

STYLES = {"spike": "yellow", "exploding": "bold red", "vanishing": "cyan", "nonfinite": "magenta"}


def watch_log(path: Path, every: float, console: Console, go_on: Callable[[], bool]) -> None:
    """Show the newest run of a log, again whenever the file has changed.

    Args:
        path: of the log; may not be there yet.
        every: seconds between two looks.
        console: where to show it; outside a terminal, a line for each change.
        go_on: whether to look again.

    Raises:
        ConfigurationError: a file that has other lines than those of a log.
    """
    if not console.is_terminal:
        for run in _changes(path, every, go_on):
            if run is not None:
                console.print(_line(run), markup=False, soft_wrap=True)
        return
    with Live(console=console, refresh_per_second=4) as live:
        for run in _changes(path, every, go_on):
            live.update(Text(f"waiting for {in_one_line(path)}") if run is None else view(run))


def view(run: Run) -> Group:
    """A run as it stands: its norms as a line, and the newest steps."""
    summary = Summary.of(run)
    table = Table(title=Text(f"{run.name}: {summary.steps} steps"))
    for heading in ("step", "norm", "after", "coefficient", "clipped", "state"):
        table.add_column(heading, justify="left" if heading == "state" else "right")
    for at in range(max(0, len(run.steps) - STEPS_SHOWN), len(run.steps)):
        state = STATES[run.states[at]]
        skipped = ", skipped" if run.skipped[at] else ""
        table.add_row(
            f"{run.steps[at]:.0f}", f"{run.total_norm[at]:.4g}", f"{run.clipped_norm[at]:.4g}",
            f"{run.coefficient[at]:.3g}", f"{100 * run.clipped_fraction[at]:.0f}%",
            Text(state + skipped, style=STYLES.get(state, "")),
        )  # fmt: skip
    states = ", ".join(f"{name} {count}" for name, count in summary.states.items())
    below = f"steps clipped {summary.clipped:.0%}; {states}; spike score {summary.spike_score:.2g}%"
    return Group(Text(sparkline(run.total_norm)), table, Text(below))


def _line(run: Run) -> str:
    skipped = ", skipped" if run.skipped[-1] else ""
    return (
        f"step {run.steps[-1]:.0f}: norm {run.total_norm[-1]:.4g} -> {run.clipped_norm[-1]:.4g}, "
        f"{STATES[run.states[-1]]}{skipped}"
    )


def _changes(path: Path, every: float, go_on: Callable[[], bool]) -> Iterator[Run | None]:
    """The newest run at first, and after each change; None while there is no file with a line."""
    seen: tuple[int, float] | None = None
    first = True
    while True:
        if path.exists():
            found = path.stat()
            now = (found.st_size, found.st_mtime)
            if now != seen and found.st_size:
                seen = now
                yield read_run(path)
        elif first:
            yield None
        first = False
        if not go_on():
            return
        time.sleep(every)
