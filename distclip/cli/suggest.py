"""``distclip suggest``: a threshold from recorded runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from distclip.common.foreign import in_one_line

FEW_STEPS = 100
"""Steps below which a percentile of the norms says little."""


def suggest(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN.jsonl...", help="Files that `log` wrote; they count together."),
    ],
    percentile: Annotated[
        float, typer.Option(help="Of the norms, or ratios, before clipping; in (0, 100].")
    ] = 90.0,
    policy: Annotated[
        Literal["global_norm", "agc"],
        typer.Option(help="agc: a clip_factor, from ratios of gradient to weight."),
    ] = "global_norm",
    first_step: Annotated[
        float, typer.Option("--from", help="Leave out the steps before this one, such as warm-up.")
    ] = 0.0,
) -> None:
    """Print a configuration with a threshold for a policy, from recorded runs.

    distclip suggest runs/measure.jsonl > policy.yaml
    """
    from distclip.monitor.reading import read_runs
    from distclip.monitor.suggesting import Suggestion

    recorded = [run for path in runs for run in read_runs(path)]
    of, what = Suggestion.of_norms, "norms"
    if policy == "agc":
        of, what = Suggestion.of_ratios, "ratios"
    found = of(recorded, percentile, first_step)
    if found.clipped > 0.0:
        share = f"{found.clipped:.0%}" if found.clipped >= 0.01 else "under 1%"
        typer.echo(
            f"distclip: in {share} of these steps something was clipped: their {what} "
            f"are those of a run that was already held back; record one with policy: measure",
            err=True,
        )
    if found.steps < FEW_STEPS:
        typer.echo(f"distclip: {found.steps} steps are few for a percentile", err=True)
    if found.spread > 2.0:
        typer.echo(
            f"distclip: the runs differ: the largest of their median {what} is {found.spread:.3g} "
            f"times the smallest; a threshold for all of them fits none",
            err=True,
        )
    # A comment ends with its line, so a name in it must not.
    typer.echo(f"# {', '.join(map(in_one_line, runs))}: {found.about}")
    for candidate in found.candidates:
        typer.echo(f"# {candidate}")
    typer.echo(found.configuration)
