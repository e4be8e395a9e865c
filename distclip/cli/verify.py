"""``distclip verify``: layouts x policies x dtypes x ranks, against the float64 oracle."""

from __future__ import annotations

import functools
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from distclip._foreign import clean, clean_lines
from distclip.errors import ConfigurationError
from distclip.testing import RankError, run_on_ranks
from distclip.testing.models.cases import DTYPES, LAYOUTS, POLICIES
from distclip.tools.verify import cells as verify_cells
from distclip.tools.verify import model as verify_model
from distclip.tools.verify import reports as verify_reports
from distclip.tools.verify.cells import Cell, Found
from distclip.tools.verify.reports import Matrix

RANKS = (2, 3, 4)

QUICK = ("global", "value", "block rms", "agc", "dreamer", "chain agc, global", "by name")
"""Policies of a quick run: one of each kind."""

LIMIT = 120.0
"""Seconds until one layout with one dtype counts as hung; a single policy gets a quarter."""

Runner = Callable[[Sequence[str]], list[Found]]


def verify(
    layouts: Annotated[
        str | None, typer.Option(help=f"Of: {', '.join(LAYOUTS)}. With --model: see the docs.")
    ] = None,
    policies: Annotated[
        str | None, typer.Option(help="Names as in the table, comma-separated; agc* is a pattern.")
    ] = None,
    dtypes: Annotated[str | None, typer.Option(help=f"Of: {', '.join(DTYPES)}.")] = None,
    ranks: Annotated[str | None, typer.Option(help="Numbers of gloo ranks, such as 2,4.")] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="2 ranks, 2 dtypes, one policy of each kind: seconds.")
    ] = False,
    model: Annotated[
        str | None, typer.Option(help="Your own: package.module:function, gives a module.")
    ] = None,
    batch: Annotated[
        str | None, typer.Option(help="With --model: package.module:function, gives a batch.")
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Write every cell as JSON.")] = None,
    junit: Annotated[Path | None, typer.Option(help="Write every cell as JUnit XML.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the table as Markdown.")] = None,
) -> None:
    """Hold clipping against the float64 oracle, on gloo ranks of this machine.

    Lists are comma-separated. The exit code is 1 if a cell failed, and 0 otherwise.
    """
    if (model is None) != (batch is None):
        raise ConfigurationError("verify: --model and --batch go together")
    known = LAYOUTS if model is None else verify_model.LAYOUTS
    kinds = DTYPES if model is None else DTYPES[:2] if dtypes is None else DTYPES[:3]
    matrix = Matrix("The built-in model" if model is None else model)
    small = quick or model is not None
    chosen = {
        "layouts": _chosen("--layouts", layouts, list(known)),
        "policies": _chosen("--policies", policies, list(POLICIES), QUICK if small else None),
        "dtypes": _chosen("--dtypes", dtypes, list(kinds), kinds[:2] if quick else None),
    }
    counts = _ranks(ranks, (2,) if quick else RANKS if model is None else (2, 4))
    everything = {"layouts": known, "policies": POLICIES, "dtypes": kinds}
    for what, names in chosen.items():
        if rest := [name for name in everything[what] if name not in names]:
            matrix.left_out.append(f"{what} not asked for: {', '.join(rest)}")
    if model is not None and batch is not None:
        sys.path[:0] = [] if "" in sys.path or os.getcwd() in sys.path else [os.getcwd()]
        verify_model.load_target(model, "--model")
        verify_model.load_target(batch, "--batch")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    _run(matrix, chosen, counts, model, batch)
    _write(
        matrix,
        {
            json: verify_reports.as_json,
            junit: verify_reports.as_junit,
            markdown: verify_reports.markdown,
        },
    )
    if matrix.count("failed"):
        raise typer.Exit(1)


def _run(
    matrix: Matrix,
    chosen: dict[str, list[str]],
    counts: Sequence[int],
    model: str | None,
    batch: str | None,
) -> None:
    console = Console()
    groups = [
        (n, layout, dtype)
        for n in counts
        for layout in chosen["layouts"]
        for dtype in chosen["dtypes"]
    ]
    start = time.perf_counter()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=len(groups) * len(chosen["policies"]))
        for world, layout, dtype in groups:
            progress.update(task, description=f"{layout}, {dtype}, {world} ranks")
            if model is None or batch is None:
                seed = DTYPES.index(dtype)
                call = functools.partial(verify_cells.run_group, layout, dtype, seed=seed)
            else:
                call = functools.partial(
                    verify_model.run_group, layout, dtype, model=model, batch=batch
                )
            labels = chosen["policies"]
            for label, found in zip(labels, _group(call, world, labels), strict=True):
                matrix.results[Cell(layout, label, dtype, world)] = found
            progress.advance(task, len(labels))
    matrix.seconds = time.perf_counter() - start
    console.print(verify_reports.table(matrix))
    for line in verify_reports.failures(matrix):
        console.print(clean_lines(line), style="red", markup=False, highlight=False)
    for line in matrix.reasons():
        shown = clean_lines(f"not run: {line}")
        console.print(shown, style="dim", markup=False, highlight=False)
    console.print(matrix.summary(), highlight=False)


def _group(call: Runner, world: int, labels: Sequence[str]) -> list[Found]:
    """The cells of one layout and dtype; one by one where a rank fell out of step."""
    try:
        return verify_cells.merged(run_on_ranks(call, world, labels, timeout=LIMIT))
    except RankError as error:
        if len(labels) == 1:
            return [Found("failed", str(error))]
    results = []
    for label in labels:
        try:
            found = run_on_ranks(call, world, [label], timeout=LIMIT / 4)
            results += verify_cells.merged(found)
        except RankError as error:
            results.append(Found("failed", str(error)))
    return results


def _write(matrix: Matrix, outputs: dict[Path | None, Callable[[Matrix], str]]) -> None:
    for path, render in outputs.items():
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(render(matrix), encoding="utf-8")
            typer.echo(f"written to {clean(path)}")


def _chosen(
    option: str, text: str | None, known: list[str], default: Sequence[str] | None = None
) -> list[str]:
    import fnmatch

    if text is None:
        return list(default or known)
    # Some names of policies have a comma in them.
    asked, rest = [], text.strip()
    while rest:
        fits = [name for name in known if rest == name or rest.startswith(f"{name},")]
        whole = max(fits, key=len, default="")
        part = whole or rest.split(",")[0]
        asked.append(part.strip())
        rest = rest[len(part) :].lstrip(", ")
    found: list[str] = []
    for part in asked:
        matches = [name for name in known if fnmatch.fnmatchcase(name, part)]
        if not matches:
            raise ConfigurationError(f"verify: {option} {part!r}; there are {', '.join(known)}")
        found += [name for name in matches if name not in found]
    return found


def _ranks(text: str | None, default: tuple[int, ...]) -> list[int]:
    if text is None:
        return list(default)
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        counts = [0]
    if min(counts) < 1 or max(counts) > 64:
        raise ConfigurationError(f"verify: --ranks {text!r}; give numbers from 1 to 64, as 2,3,4")
    return list(dict.fromkeys(counts))
