"""``distclip simulate``: the user's own script on gloo ranks, under one layout or several."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from distclip.common.foreign import in_one_line
from distclip.tools.simulate.layouts import SIMULATED_LAYOUTS

if TYPE_CHECKING:
    from rich.console import Console

    from distclip.tools.simulate.running import Simulation
    from distclip.tools.simulate.shown import LayoutOutcome

DEFAULT = ("ddp", "fsdp2")


def simulate(
    script: Annotated[
        str,
        typer.Argument(metavar="SCRIPT", help="Script, or with -m a module.", show_default=False),
    ],
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="ARGS", help="Arguments of the script.")
    ] = None,
    ranks: Annotated[int, typer.Option(min=1, metavar="N", help="gloo ranks, over all nodes.")] = 2,
    layout: Annotated[
        list[str] | None,
        typer.Option(
            metavar="LAYOUT",
            help=f"One of {', '.join(SIMULATED_LAYOUTS)}; may be repeated.  "
            f"[default: {' and '.join(DEFAULT)}]",
        ),
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", "-c", metavar="FILE", help="Policy, YAML or JSON.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="End the script after N optimizer steps.")
    ] = None,
    host_count: Annotated[
        int, typer.Option("--nodes", min=1, metavar="N", help="Nodes, each with its own launcher.")
    ] = 1,
    tolerance: Annotated[
        float,
        typer.Option(
            metavar="X", help="Relative difference of losses and norms allowed between layouts."
        ),
    ] = 1e-4,
    timeout: Annotated[
        float,
        typer.Option(
            min=1.0, metavar="SECONDS", help="Without progress on any rank, the run has hung."
        ),
    ] = 60.0,
    allow_branches: Annotated[
        bool, typer.Option("--allow-branches", help="Let ranks run different operations.")
    ] = False,
    json: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write all results as JSON.")
    ] = None,
    keep: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Keep journals and output of ranks.")
    ] = None,
    module: Annotated[bool, typer.Option("-m", help="Run a module, as python -m does.")] = False,
) -> None:
    """Run your script on several local ranks, and compare them.

    distclip simulate --ranks 4 --layout ddp --layout fsdp2 train.py --lr 0.1

    The script is run unchanged, on gloo ranks of this machine. The exit code is 1 if ranks or
    layouts differ, and 0 otherwise.
    """
    # Long: most of it is the list of options.
    from rich.console import Console

    from distclip.tools.simulate import nodes, shown
    from distclip.tools.simulate.running import Simulation

    # The reference first.
    chosen = sorted(dict.fromkeys(layout or DEFAULT), key=lambda name: name != "single")
    console = Console()
    simulation = Simulation(
        script, arguments or (), module, ranks, host_count, config, steps, tolerance, timeout,
        allow_branches, keep,
    )  # fmt: skip
    if host_count > 1 and (reason := nodes.why_not()):
        console.print(f"no network namespaces here: {reason}", style="dim", markup=False)
    outcomes = _run_with_progress(simulation, chosen, console)
    shown.show_outcomes(outcomes, tolerance, console)
    if skipped := chosen[len(outcomes) :]:
        console.print(f"not run after that: {', '.join(skipped)}", style="dim")
    if json is not None:
        json.parent.mkdir(parents=True, exist_ok=True)
        json.write_text(shown.outcomes_as_json(outcomes, tolerance), encoding="utf-8")
        typer.echo(f"written to {in_one_line(json)}")
    if not all(outcome.sound for outcome in outcomes):
        raise typer.Exit(1)


def _run_with_progress(
    simulation: Simulation, chosen: list[str], console: Console
) -> list[LayoutOutcome]:
    """Run the layouts, with a line on a terminal that shows how far each is."""
    from rich.markup import escape
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("")
        return simulation.run(
            chosen,
            lambda text: progress.update(task, description=escape(in_one_line(text))),
            (lambda outcome: None) if console.is_terminal else _tell_ended,
        )


def _tell_ended(outcome: LayoutOutcome) -> None:
    """A line for a layout, where there is no terminal that shows how far it is."""
    ending = outcome.ending
    steps = min((rank.done for rank in ending.ranks), default=0)
    typer.echo(
        f"{in_one_line(outcome.layout)}: {ending.how}, {steps} steps, {ending.seconds:.1f} s",
        err=True,
    )
