"""``distclip suggest``: a threshold from recorded runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from distclip.cli.kinds import a_word
from distclip.common.foreign import in_one_line


def suggest(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN.jsonl", help="Files that `log` wrote; they count together."),
    ],
    percentile: Annotated[
        float, a_word("P", "Percentile of the norms (or ratios); in (0, 100].")
    ] = 90.0,
    policy: Annotated[
        Literal["global_norm", "agc"],
        a_word("NAME", "global_norm, or agc for a log with ratios of gradient to weight."),
    ] = "global_norm",
    first_step: Annotated[
        float, a_word("STEP", "Leave out earlier steps, such as warm-up.", "--from")
    ] = 0.0,
) -> None:
    """Print a policy with a threshold from recorded runs.

    distclip suggest runs/measure.jsonl > policy.yaml
    """
    from distclip.monitor.reading import read_runs
    from distclip.monitor.suggesting import Suggestion

    recorded = [run for path in runs for run in read_runs(path)]
    of = Suggestion.of_ratios if policy == "agc" else Suggestion.of_norms
    found = of(recorded, percentile, first_step)
    for doubt in found.doubts:
        typer.echo(f"distclip: {doubt}", err=True)
    # A comment ends with its line, so a name in it must not.
    typer.echo(f"# {', '.join(map(in_one_line, runs))}: {found.about}")
    for candidate in found.candidates:
        typer.echo(f"# {candidate}")
    typer.echo(found.configuration)
