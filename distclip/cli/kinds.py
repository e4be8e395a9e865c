"""Kinds of options and arguments that several commands have."""

from __future__ import annotations

from typing import Any

import typer


def a_word(word: str, text: str, *names: str, **limits: Any) -> Any:
    """An option whose value the help text calls ``word``."""
    return typer.Option(*names, metavar=word, help=text, **limits)


def a_file(text: str, *names: str) -> Any:
    """An option that takes a file."""
    return a_word("FILE", text, *names)


def a_count(text: str, *names: str) -> Any:
    """An option that takes a whole number from 1 on."""
    return a_word("N", text, *names, min=1)


SCRIPT_NAME = typer.Argument(
    metavar="SCRIPT", help="Script, or module with -m.", show_default=False
)
SCRIPT_ARGS = typer.Argument(metavar="ARGS", help="Arguments of the script.")
MODULE = typer.Option("-m", help="Run a module, as python -m does.")
