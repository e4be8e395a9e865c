"""``distclip report``: what recorded runs say about their clipping."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from distclip.cli.kinds import a_count, a_file, a_word
from distclip.common.foreign import in_one_line
from distclip.errors import ConfigurationError


def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN.jsonl", help="Files that `log` wrote.")
    ],
    loss: Annotated[
        list[Path] | None, a_file("Training log with step and loss; one for each run.", "--loss")
    ] = None,
    out: Annotated[
        Path | None, a_file("Page (html) or picture (png, svg, pdf) to write.", "--out", "-o")
    ] = None,
    serve: Annotated[
        bool, typer.Option("--serve", help="Serve the page on this machine; it follows the runs.")
    ] = False,
    port: Annotated[
        int | None,
        a_word("N", "Of --serve, instead of 8237; 0: any that is free.", min=0, max=65535),
    ] = None,
    modules: Annotated[
        int | None, a_count("Show modules too: the first N parts of parameters' names.")
    ] = None,
) -> None:
    """Show norms, clipping and advice of recorded runs.

    distclip report runs/clip.jsonl -o page.html

    Runs that differ in a seed only (agc_seed0.jsonl, agc_seed1.jsonl) are drawn as one group.
    """
    from distclip.monitor import page, plots, table
    from distclip.monitor.reading import read_loss, read_runs
    from distclip.monitor.summary import summaries

    if serve:
        if loss or out is not None:
            raise ConfigurationError("report: --serve writes nothing; leave out --out and --loss")
        _serve(runs, port)
        return
    if port is not None:
        raise ConfigurationError("report: --port is for --serve")
    _check_loss(loss, runs, out)
    by_file = [read_runs(path) for path in runs]
    recorded = [run for found in by_file for run in found]
    summed = summaries(recorded)
    table.show_runs(summed)
    if modules is not None:
        table.show_modules(recorded, modules)
    if out is None:
        return
    if _is_page(out):
        page.save_page(recorded, summed, out)
        typer.echo(f"\npage: {in_one_line(out)}")
        return
    pairs = zip(loss or (), by_file, strict=False)
    curves = [read_loss(path, found[-1].group) for path, found in pairs]
    plots.save(plots.draw(recorded, curves), out)
    typer.echo(f"\npicture: {in_one_line(out)}")


def _check_loss(loss: list[Path] | None, runs: list[Path], out: Path | None) -> None:
    if loss and len(loss) != len(runs):
        raise ConfigurationError(
            f"report: {len(loss)} --loss for {len(runs)} runs; give one for each run, in the "
            f"same order, or none"
        )
    if loss and (out is None or _is_page(out)):
        raise ConfigurationError(
            "report: --loss is for the picture; name one with --out (png, svg, pdf)"
        )


def _serve(runs: list[Path], port: int | None) -> None:
    from distclip.monitor.page.serving import PORT, PageServer

    with PageServer(runs, PORT if port is None else port) as server:
        typer.echo(f"page: {server.address} (this machine only; Ctrl-C ends)")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            raise typer.Exit() from None


def _is_page(out: Path) -> bool:
    return out.suffix.lower() in (".html", ".htm")
