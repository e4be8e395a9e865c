"""``distclip verify``: layouts x policies x dtypes x ranks, against the float64 oracle."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from distclip.cli.kinds import a_file, a_word
from distclip.common.foreign import clean_lines, in_one_line
from distclip.testing.cases import DTYPES, MATRIX_LAYOUTS

if TYPE_CHECKING:
    from distclip.tools.verify.reports import Matrix


def verify(
    layouts: Annotated[str | None, a_word("LIST", f"Some of {', '.join(MATRIX_LAYOUTS)}.")] = None,
    policies: Annotated[
        str | None, a_word("LIST", "Names as in the table, or patterns such as agc*.")
    ] = None,
    dtypes: Annotated[str | None, a_word("LIST", f"Some of {', '.join(DTYPES)}.")] = None,
    ranks: Annotated[str | None, a_word("LIST", "Numbers of gloo ranks, such as 2,4.")] = None,
    quick: Annotated[
        bool,
        typer.Option("--quick", help="2 ranks, 2 dtypes, one policy of each kind; takes seconds."),
    ] = False,
    model: Annotated[
        str | None, a_word("FUNCTION", "package.module:function that returns a model of your own.")
    ] = None,
    batch: Annotated[
        str | None,
        a_word("FUNCTION", "With --model: package.module:function that returns a batch."),
    ] = None,
    json: Annotated[Path | None, a_file("Write every cell as JSON.")] = None,
    junit: Annotated[Path | None, a_file("As JUnit XML.")] = None,
    markdown: Annotated[Path | None, a_file("Write the table as Markdown.")] = None,
) -> None:
    """Compare clipping with a float64 reference, on local ranks.

    Layouts, policies, dtypes and numbers of ranks are combined; all by default. Lists are
    comma-separated. The exit code is 1 if a cell failed, and 0 otherwise.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from distclip.tools.verify import reports, running

    selection = running.select(
        layouts=layouts, policies=policies, dtypes=dtypes, ranks=ranks, quick=quick,
        user_model=model, batch=batch,
    )  # fmt: skip
    description = TextColumn("{task.description}")
    columns = description, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    total = len(list(selection.groups)) * len(selection.policies)
    with Progress(*columns, transient=True) as progress:
        task = progress.add_task("", total=total)

        def tell(text: str, done: int) -> None:
            progress.update(task, description=text, advance=done)
            if done and not progress.console.is_terminal:
                seconds = progress.tasks[0].elapsed or 0.0
                count = f"{progress.tasks[0].completed:.0f} of {total} cells"
                typer.echo(f"{in_one_line(text)}: {count}, {seconds:.1f} s", err=True)

        matrix = running.run_matrix(selection, tell)
    _show_matrix(matrix)
    _write(
        matrix,
        {json: reports.matrix_as_json, junit: reports.as_junit, markdown: reports.markdown},
    )
    if matrix.count("failed"):
        raise typer.Exit(1)


def _show_matrix(matrix: Matrix) -> None:
    from rich.console import Console

    from distclip.tools.verify import reports

    console = Console()
    console.print(reports.matrix_table(matrix))
    for line in reports.failures(matrix):
        console.print(clean_lines(line), style="red", markup=False, highlight=False)
    for line in matrix.reasons():
        shown = clean_lines(f"not run: {line}")
        console.print(shown, style="dim", markup=False, highlight=False)
    console.print(matrix.summary(), highlight=False)


def _write(matrix: Matrix, outputs: dict[Path | None, Callable[[Matrix], str]]) -> None:
    for path, render in outputs.items():
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(render(matrix), encoding="utf-8")
            typer.echo(f"written to {in_one_line(path)}")
