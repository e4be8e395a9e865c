"""``distclip bench``: clipping measured against its peers, in one run and in turn."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from distclip.cli.kinds import a_count, a_file, a_word
from distclip.common.foreign import in_one_line
from distclip.errors import ConfigurationError

if TYPE_CHECKING:
    from rich.console import Console

    from distclip.tools.bench.record import CaseRecord, Record

HUNG_AFTER = 600.0
"""Seconds beyond its budget until a case counts as hung."""
TABLE_WIDTH = 120
"""Characters of a table where nothing else says."""


def bench(
    cases: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="CASES",
            help="Cases, or groups of cases; see --list. All by default.",
            show_default=False,
        ),
    ] = None,
    ranks: Annotated[int, a_count("gloo ranks on this machine.")] = 2,
    rounds: Annotated[int, a_count("Measured rounds.")] = 30,
    budget: Annotated[
        float, a_word("SECONDS", "After which a case begins no new round.", min=1.0)
    ] = 8.0,
    output: Annotated[Path | None, a_file("Write every round as JSON.")] = None,
    source: Annotated[
        Path | None, a_file("Show a run of --output; measure nothing.", "--from")
    ] = None,
    picture: Annotated[
        Path | None, a_file("Draw the run (png, svg, pdf); needs matplotlib.")
    ] = None,
    show_list: Annotated[
        bool, typer.Option("--list", help="Show the cases and groups; measure nothing.")
    ] = False,
) -> None:
    """Compare the speed of clipping with that of its peers.

    On gloo ranks, with one thread each. On a shared machine only ratios are of use: each round
    measures all peers once, in random order, and ratios are those of one round. Times are those of
    the slowest rank.
    """
    from rich.console import Console

    from distclip.monitor import plots
    from distclip.tools.bench import record as bench_record

    if show_list:
        _list()
        return
    if source is not None and (cases or output is not None):
        raise ConfigurationError(
            "bench: --from shows a kept run as it is; give it no cases and no --output"
        )
    if picture is not None:
        plots.backend()  # before minutes of measuring are lost for the want of it
    console = Console()
    if not console.is_terminal:  # a file or a pipe has no width of its own
        console = Console(width=TABLE_WIDTH)
    if source is None:
        record = _measured(_chosen(cases or ()), ranks, rounds, budget, console)
    else:
        record = bench_record.read_record(source)
        for case in record.cases.values():
            _show_timings(console, case, record.ranks)
        told = ", ".join(f"{key}: {value}" for key, value in record.machine.items())
        console.print(in_one_line(told), markup=False)
    if output is not None:
        record.write(output)
        console.print(f"written to {in_one_line(output)}", markup=False)
    if picture is not None:
        from distclip.tools.bench import draw as bench_draw

        bench_draw.save_chart(record, picture)
        console.print(f"drawn in {in_one_line(picture)}", markup=False)


def _list() -> None:
    from distclip.tools.bench.cases import CASES, GROUPS

    for case in CASES.values():
        typer.echo(f"{case.name}: {case.title}")
    for group, names in GROUPS.items():
        typer.echo(f"{group}: all of {', '.join(names)}")


def _chosen(cases: list[str] | tuple[str, ...]) -> list[str]:
    from distclip.tools.bench.cases import CASES, GROUPS

    if not cases:
        there = find_spec("deepspeed") is not None
        return [name for name in CASES if there or name not in GROUPS["zero"]]
    chosen = list(dict.fromkeys(part for name in cases for part in GROUPS.get(name, (name,))))
    for name in chosen:
        if name not in CASES:
            raise ConfigurationError(
                f"bench: no case {name!r}; there are {', '.join([*CASES, *GROUPS])}"
            )
        if name in GROUPS["zero"] and find_spec("deepspeed") is None:
            raise ConfigurationError(f'bench: {name} needs pip install "distclip[deepspeed]"')
    return chosen


def _measured(
    chosen: list[str], ranks: int, rounds: int, budget: float, console: Console
) -> Record:
    from distclip.testing import run_on_ranks
    from distclip.tools.bench import cases as bench_cases
    from distclip.tools.bench import record as bench_record
    from distclip.tools.bench.cases import CASES

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    machine = bench_record.machine()
    found: dict[str, CaseRecord] = {}
    for name in chosen:
        case = CASES[name]
        taken = run_on_ranks(
            bench_cases.run_case,
            case.ranks or ranks,
            name,
            rounds,
            budget,
            timeout=budget + HUNG_AFTER,
        )
        found[name] = bench_record.combined_ranks(case.title, case.peer, taken, case.ranks)
        _show_timings(console, found[name], ranks)
    return bench_record.Record(bench_record.with_load(machine), ranks, found)


def _show_timings(console: Console, case: CaseRecord, ranks: int) -> None:
    from rich.markup import escape
    from rich.table import Table
    from rich.text import Text

    from distclip.tools.bench import record as bench_record

    ranks = case.ranks or ranks
    rounds = len(next(iter(case.ways.values())).wall_ms)
    table = Table(
        title=Text(
            in_one_line(f"{case.title}, {ranks} rank{'s' if ranks > 1 else ''}, {rounds} rounds")
        ),
        caption=f"faster: times faster than {escape(in_one_line(case.peer))}; extra: held at once, "
        f"at most {case.allowed_bytes / 1024:.0f} KiB allowed",
    )
    table.add_column("way", overflow="fold")
    for heading in ("median, ms", "quartiles", "faster", "CPU, ms", "faster", "extra, KiB"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in bench_record.case_rows(case):
        table.add_row(
            Text(in_one_line(row.name)),
            f"{row.median_ms:.2f}",
            f"{row.low_ms:.2f} to {row.high_ms:.2f}",
            _times(row.ratio),
            f"{row.cpu_ms:.2f}",
            _times(row.cpu_ratio),
            f"{row.extra_bytes / 1024:.0f}",
        )
    console.print(table)
    for name, number in case.numbers.items():
        console.print(in_one_line(f"{name}: {number:.2g}"), markup=False)
    for name, why in sorted(case.missing.items()):  # a long reason would take a column's width
        console.print(in_one_line(f"{name}: {why}"), markup=False)


def _times(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio == ratio else ""
