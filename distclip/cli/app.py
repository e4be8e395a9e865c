"""The application that the commands hang on, and its entry point."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from distclip._version import __version__
from distclip.cli import bench, config, doctor, report, run, simulate, suggest, verify, watch
from distclip.common.foreign import clean_lines
from distclip.errors import DistclipError
from distclip.tools.launch import reason


class _Group(TyperGroup):
    """The commands; a usage error repeats what was typed, or what a file name expanded to."""

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        with _cleaned():
            return super().make_context(*args, **kwargs)

    def invoke(self, *args: Any, **kwargs: Any) -> Any:
        with _cleaned():
            return super().invoke(*args, **kwargs)


@contextlib.contextmanager
def _cleaned() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if isinstance(getattr(error, "message", None), str):
            error.message = clean_lines(error.message)  # type: ignore[attr-defined]
        raise


app = typer.Typer(
    name="distclip",
    cls=_Group,
    help="Gradient clipping that means the same thing on one process and on a thousand ranks.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # its boxes take a third of 80 columns, and break lines within a text
)
app.command(name="run", context_settings=run.CONTEXT)(run.run)
app.command(name="simulate", context_settings=run.CONTEXT)(simulate.simulate)
app.add_typer(config.config_app, name="config")
app.command(name="report")(report.report)
app.command(name="watch")(watch.watch)
app.command(name="suggest")(suggest.suggest)
app.command(name="doctor")(doctor.doctor)
app.command(name="verify")(verify.verify)
app.command(name="bench")(bench.bench)
# A further command is one line here and one file beside this one.


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"distclip {__version__}")
        raise typer.Exit()


@app.callback()
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
    local_rank: Annotated[
        str | None, typer.Option("--local_rank", "--local-rank", hidden=True)
    ] = None,
) -> None:
    # The deepspeed launcher puts --local_rank=N before the arguments of the program it starts.
    # It is meant for the user's script, which gets it.
    run.from_launcher(context, local_rank)


def main() -> None:
    """Run one command; the entry point of ``distclip`` and ``python -m distclip``."""
    excepthook = sys.excepthook
    try:
        app()
    except (DistclipError, OSError) as error:  # OSError: a file that cannot be written
        rank = f" [rank {os.environ['RANK']}]" if "RANK" in os.environ else ""
        typer.echo(f"distclip{rank}: {clean_lines(error)}", err=True)
        reason.leave(f"distclip: {error}")
        sys.exit(2)
    except SystemExit as error:
        if error.code not in (None, 0) or not run.pending:
            raise
    finally:
        sys.excepthook = excepthook  # typer puts its own in place
    # Out here the user's script runs below nothing of ours that would catch what it raises.
    if run.pending:
        run.pending.pop()()
