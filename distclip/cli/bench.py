"""``distclip bench``: clipping measured against its peers, in one run and in turn."""

from __future__ import annotations

import datetime
import json
import os
import platform
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from distclip._version import __version__
from distclip.cli import bench_cases
from distclip.cli.bench_cases import CASES, COUNTS, GROUPS, Row
from distclip.errors import ConfigurationError

LIMIT = 600.0
"""Seconds until a case counts as hung."""


def bench(
    cases: Annotated[
        list[str] | None,
        typer.Argument(
            help=f"Of: {', '.join([*CASES, *GROUPS])}, count. All by default.", show_default=False
        ),
    ] = None,
    ranks: Annotated[int, typer.Option(min=1, help="gloo ranks on this machine.")] = 2,
    rounds: Annotated[int, typer.Option(min=1, help="Measured rounds of each way.")] = 30,
    output: Annotated[Path | None, typer.Option(help="Write the numbers as JSON.")] = None,
) -> None:
    """Measure clipping against its peers, on gloo ranks, one thread each.

    Only ratios mean something on a shared machine: every round runs all ways in turn, and the ratio
    is taken round by round. Times are those of the slowest rank.
    """
    from distclip.testing import run_on_ranks

    chosen = [part for name in cases or () for part in GROUPS.get(name, (name,))]
    if not cases:
        there = find_spec("deepspeed") is not None
        chosen = [name for name in CASES if there or name not in GROUPS["zero"]] + ["count"]
    unknown = [name for name in chosen if name not in CASES and name != "count"]
    if unknown:
        raise ConfigurationError(
            f"bench: no case {unknown[0]!r}; there are {', '.join([*CASES, *GROUPS, 'count'])}"
        )
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    console = Console()
    document: dict[str, Any] = {"machine": machine(), "ranks": ranks, "rounds": rounds, "cases": {}}
    for name in chosen:
        if name == "count":
            _counts(console, ranks, rounds, document)
            continue
        case = CASES[name]
        taken = run_on_ranks(bench_cases.run_case, ranks, name, rounds, timeout=LIMIT)
        result = bench_cases.rows(taken, case.peer)
        document["cases"][name] = [asdict(row) for row in result]
        console.print(_table(f"{case.title}, {ranks} ranks", case.peer, result))
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(document, indent=2) + "\n")
        console.print(f"written to {output}")


def _counts(console: Console, ranks: int, rounds: int, document: dict[str, Any]) -> None:
    from distclip.testing import run_on_ranks

    table = Table(title=f"DTensor parameters of 64 elements, {ranks} ranks")
    for heading in ("parameters", "distclip, ms", "µs each", "times the first", "torch, ms"):
        table.add_column(heading, justify="right")
    first: float | None = None
    for number in COUNTS:
        turns = max(3, rounds // (1 + number // 2000))
        taken = run_on_ranks(bench_cases.run_count, ranks, number, turns, timeout=LIMIT)
        result = {row.name: row for row in bench_cases.rows(taken, "torch clip_grad_norm_")}
        ours = result["GradClipper(global_norm)"]
        peer = result.get("torch clip_grad_norm_")
        first = first or ours.median_ms
        table.add_row(
            f"{number:,}",
            f"{ours.median_ms:.2f}",
            f"{1e3 * ours.median_ms / number:.2f}",
            f"{ours.median_ms / first:.1f}",
            f"{peer.median_ms:.2f}" if peer else "not run: grows as n * n",
        )
        document["cases"][f"count-{number}"] = [asdict(row) for row in result.values()]
    console.print(table)


def _table(title: str, peer: str, result: list[Row]) -> Table:
    table = Table(title=title)
    table.add_column("way")
    for heading in ("median, ms", "quartiles", f"times faster than\n{peer}"):
        table.add_column(heading, justify="right")
    for row in result:
        table.add_row(
            row.name,
            f"{row.median_ms:.2f}",
            f"{row.low_ms:.2f} to {row.high_ms:.2f}",
            f"{row.ratio:.2f}",
        )
    return table


def machine() -> dict[str, str]:
    """Where and when this was measured."""
    return {
        "date": datetime.date.today().isoformat(),
        "processor": platform.processor() or platform.machine(),
        "cores": str(os.cpu_count()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "distclip": __version__,
    }
