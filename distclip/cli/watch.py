"""``distclip watch``: a log in the terminal while the run goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def watch(
    run: Annotated[Path, typer.Argument(metavar="RUN.jsonl", help="File that `log` writes.")],
    every: Annotated[
        float, typer.Option(min=0.1, metavar="SECONDS", help="Between two looks.")
    ] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Look once, and end.")] = False,
) -> None:
    """Show norms and states of a run while it goes on.

    Ctrl-C ends. The file need not be there yet. Outside a terminal, a line is printed for each
    change.
    """
    from rich.console import Console

    from distclip.monitor.watching import watch_log as show

    console = Console(highlight=False, emoji=False)
    try:
        show(run, every, console, lambda: not once)
    except KeyboardInterrupt:
        raise typer.Exit() from None
