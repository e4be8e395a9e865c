"""``distclip simulate``: the user's own script on gloo ranks, under one layout or several."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from distclip.cli.kinds import MODULE, SCRIPT_ARGS, SCRIPT_NAME, a_count, a_file, a_word
from distclip.common.foreign import in_one_line
from distclip.tools.simulate.layouts import SIMULATED_LAYOUTS

if TYPE_CHECKING:
    from rich.console import Console

    from distclip.tools.simulate.running import Simulation
    from distclip.tools.simulate.shown import LayoutOutcome

DEFAULT = ("ddp", "fsdp2")


def simulate(
    script: Annotated[str, SCRIPT_NAME],
    arguments: Annotated[list[str] | None, SCRIPT_ARGS] = None,
    ranks: Annotated[int, a_count("gloo ranks, over all nodes.")] = 2,
    layout: Annotated[
        list[str] | None,
        a_word("LAYOUT", f"One of {', '.join(SIMULATED_LAYOUTS)}; may be repeated."),
    ] = None,
    config: Annotated[Path | None, a_file("Policy, YAML or JSON.", "--config", "-c")] = None,
    steps: Annotated[int | None, a_count("End the script after N optimizer steps.")] = None,
    host_count: Annotated[int, a_count("Nodes, each with its own launcher.", "--nodes")] = 1,
    tolerance: Annotated[
        float, a_word("X", "Relative difference of losses and norms allowed between layouts.")
    ] = 1e-4,
    timeout: Annotated[
        float, a_word("SECONDS", "Without progress on any rank, the run has hung.", min=1.0)
    ] = 60.0,
    allow_branches: Annotated[
        bool, typer.Option("--allow-branches", help="Let ranks run different operations.")
    ] = False,
    json: Annotated[Path | None, a_file("Write all results as JSON.")] = None,
    keep: Annotated[Path | None, a_word("FOLDER", "Keep journals and output of ranks.")] = None,
    module: Annotated[bool, MODULE] = False,
) -> None:
    """Run your script on several local ranks, and compare them.

    distclip simulate --ranks 4 --layout ddp --layout fsdp2 train.py --lr 0.1

    The script is run unchanged, on gloo ranks of this machine. The exit code is 1 if ranks or
    layouts differ, and 0 otherwise.
    """
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
