"""``distclip doctor``: what is installed, what it works with, and whether ranks are real."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from distclip.cli.kinds import a_count, a_file
from distclip.common.foreign import clean_lines, in_one_line

if TYPE_CHECKING:
    from distclip.tools.doctor import Line

LABELS = {"good": "ok  ", "note": "note", "wrong": "BAD "}
LABEL_COLOURS = {"good": "green", "note": "yellow", "wrong": "red"}


def doctor(
    json: Annotated[Path | None, a_file("Write what was found as JSON.")] = None,
    launch_config: Annotated[
        Path | None, a_file("Configuration of accelerate launch to check.", "--launch-config")
    ] = None,
    ranks: Annotated[int, a_count("gloo ranks of the self-check; 1: none.")] = 2,
) -> None:
    """Check what is installed, and that ranks are distributed.

    Run it alone, or under a launcher, whose ranks are then checked:

    accelerate launch ... -m distclip doctor

    The exit code is 1 if something is wrong.
    """
    from distclip.tools import doctor as tool

    lines = tool.examine_system(launch_config, ranks)
    if os.environ.get("RANK", "0") == "0":
        _show_findings(lines)
        if json is not None:
            json.parent.mkdir(parents=True, exist_ok=True)
            json.write_text(tool.findings_as_json(lines), encoding="utf-8")
            typer.echo(f"written to {in_one_line(json)}")
    if any(line.state == "wrong" for line in lines):
        raise typer.Exit(1)


def _show_findings(lines: list[Line]) -> None:
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    topic = ""
    for line in lines:
        if line.topic != topic:
            topic = line.topic
            console.print(f"\n{topic}", style="bold")
        mark = f"[{LABEL_COLOURS[line.state]}]{LABELS[line.state]}[/]"
        console.print(mark, end=" ")
        console.print(clean_lines(f"{line.what}: {line.text}"), markup=False)
