"""``distclip report``: what recorded runs say about their clipping."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from distclip._foreign import clean
from distclip.errors import ConfigurationError


def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN.jsonl...", help="Files that `log` wrote.")
    ],
    loss: Annotated[
        list[Path] | None,
        typer.Option("--loss", help="Training log with step and loss; one for each run."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Picture to write (png, svg, pdf).")
    ] = None,
) -> None:
    """Show norms, clipping and advice for one or several runs; draw a picture with --out.

    Runs that differ in a seed only (agc_seed0.jsonl, agc_seed1.jsonl) are drawn as one group.
    """
    from distclip.monitor import plots, table
    from distclip.monitor.runs import read_loss, read_run, summaries

    if loss and len(loss) != len(runs):
        raise ConfigurationError(
            f"report: {len(loss)} --loss for {len(runs)} runs; give one for each run, in the "
            f"same order, or none"
        )
    if loss and out is None:
        raise ConfigurationError("report: --loss is for the picture; name one with --out")
    recorded = [read_run(path) for path in runs]
    table.show(summaries(recorded))
    if out is not None:
        pairs = zip(loss or (), recorded, strict=False)
        curves = [read_loss(path, run.group) for path, run in pairs]
        plots.save(plots.draw(recorded, curves), out)
        typer.echo(f"\npicture: {clean(out)}")
