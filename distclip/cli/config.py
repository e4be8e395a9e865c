"""``distclip config``: the schema of a configuration, and a check of one."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from distclip.common.foreign import in_one_line
from distclip.policies import Chain, Policy, SideBySide

if TYPE_CHECKING:
    from distclip.config import Examined

config_app = typer.Typer(
    help="Check a configuration; show its schema.", no_args_is_help=True, rich_markup_mode=None
)


@config_app.command()
def schema() -> None:
    """Print the JSON Schema of a configuration, for editors."""
    from distclip import config

    typer.echo(json.dumps(config.json_schema(), indent=2))


@config_app.command()
def check(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="YAML or JSON.", show_default=False)],
    run_imports: Annotated[
        bool,
        typer.Option("--run-imports", help="Run the modules that the file names under imports."),
    ] = False,
) -> None:
    """Check a configuration file; print it with all defaults.

    Of a DeepSpeed JSON the "distclip" section, or its gradient_clipping, is checked. Modules under
    imports are run only with --run-imports.
    """
    from distclip import config
    from distclip.integrations.deepspeed_json import (
        SECTION,
        configured,
        examined,
        read_deepspeed_json,
    )

    document, strict = read_deepspeed_json(file) if file.suffix == ".json" else (None, True)
    name = in_one_line(file)
    found = config.examine(file) if document is None else examined(document, name=name)
    if not strict:
        typer.echo(
            f"{name} is no plain JSON (comments, or commas at the end): deepspeed.initialize reads "
            f"it, Accelerate and the Trainer do not"
        )
    if found is None:
        typer.echo(f'{name} is a DeepSpeed JSON that clips nothing: it has no "{SECTION}" section')
        return
    loaded = found.config
    if run_imports:
        sys.path.insert(0, os.getcwd())  # as under python -m
        loaded = config.load(file) if document is None else configured(document, name=name)
    if loaded is None:
        _tell_of_unknown(name, found)
        return
    typer.echo(f"{name} is valid, digest {config.digest(loaded)}")
    typer.echo("\n".join(["policy:", *_lines(loaded.policy, "  ")]))
    for name, value in loaded.arguments().items():
        if name != "policy":
            plain = json.dumps(value) if value is None or isinstance(value, bool) else value
            typer.echo(f"{name}: {plain}")
    if loaded.log is not None:
        log = ", ".join(
            f"{key}: {in_one_line(value)}"
            for key, value in loaded.log.model_dump(exclude_defaults=True).items()
        )
        typer.echo(f"log: {log}")
    if found.imports and not run_imports:
        typer.echo(f"imports: {in_one_line(', '.join(found.imports))} (not run; see --run-imports)")


def _tell_of_unknown(name: str, found: Examined) -> None:
    modules = in_one_line(", ".join(found.imports))
    one = len(found.imports) == 1
    whose = f"the module {modules}" if one else f"one of the modules {modules}"
    typer.echo(
        f"{name} is valid as far as it can be checked without running code: "
        f"{', '.join(map(repr, map(in_one_line, found.unknown)))} can be known only to {whose} "
        f"under imports, which {'was' if one else 'were'} not run; check the rest with "
        f"--run-imports"
    )


def _lines(policy: Policy | None, indent: str) -> list[str]:
    """A policy, and the policies that it is made of, a line each."""
    if policy is None:
        return [f"{indent}left alone"]
    if isinstance(policy, Chain):
        parts = [line for part in policy.policies for line in _lines(part, indent + "  ")]
        return [f"{indent}one after another:", *parts]
    if isinstance(policy, SideBySide):
        lines = [f"{indent}{policy.name.replace('_', ' ')}, the first match wins:"]
        for pattern, part in (*policy.mapping, ("all others", policy.default)):
            name = pattern if pattern == "all others" else f'"{in_one_line(pattern)}"'
            first, *rest = _lines(part, indent + "    ")
            lines += [f"{indent}  {name}: {first.strip()}", *rest]
        return lines
    return [f"{indent}{in_one_line(repr(policy))}"]
