"""``distclip config``: the schema of a configuration, and a check of one."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from distclip import config
from distclip.integrations.deepspeed_json import CLIPPING, SECTION, configured
from distclip.policies import ByName, Chain, Policy

app = typer.Typer(help="Check a configuration; show its schema.", no_args_is_help=True)


@app.command()
def schema() -> None:
    """Print the JSON Schema of a configuration, for editors and other programs."""
    typer.echo(json.dumps(config.json_schema(), indent=2))


@app.command()
def check(
    file: Annotated[Path, typer.Argument(help="YAML or JSON.", show_default=False)],
) -> None:
    """Check a configuration file and print what it means, all defaults filled in.

    Of a DeepSpeed JSON the "distclip" section, or its gradient_clipping, is checked.
    """
    sys.path.insert(0, os.getcwd())  # for `imports`, as under python -m
    document = _deepspeed(file)
    found = config.load(file) if document is None else configured(document)
    if found is None:
        typer.echo(f'{file} is a DeepSpeed JSON that clips nothing: it has no "{SECTION}" section')
        return
    loaded = found
    typer.echo(f"{file} is valid, digest {config.digest(loaded)}")
    typer.echo("\n".join(["policy:", *_lines(loaded.policy, "  ")]))
    for name, value in loaded.arguments().items():
        if name != "policy":
            typer.echo(f"{name}: {str(value).lower() if isinstance(value, bool) else value}")
    if loaded.log is not None:
        log = ", ".join(f"{key}: {value}" for key, value in loaded.log.model_dump().items())
        typer.echo(f"log: {log}")


def _deepspeed(file: Path) -> dict[str, Any] | None:
    """The content of a DeepSpeed JSON; None where the file is none."""
    if file.suffix != ".json":
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # told when it is loaded
        return None
    theirs = ("train_batch_size", "train_micro_batch_size_per_gpu", "zero_optimization")
    known = isinstance(found, dict) and not found.keys().isdisjoint((SECTION, CLIPPING, *theirs))
    return found if known else None


def _lines(policy: Policy | None, indent: str) -> list[str]:
    """A policy, and the policies that it is made of, a line each."""
    if policy is None:
        return [f"{indent}left alone"]
    if isinstance(policy, Chain):
        parts = [line for part in policy.policies for line in _lines(part, indent + "  ")]
        return [f"{indent}one after another:", *parts]
    if isinstance(policy, ByName):
        lines = [f"{indent}by name, the first match wins:"]
        for pattern, part in (*policy.mapping, ("all others", policy.default)):
            name = pattern if pattern == "all others" else f'"{pattern}"'
            first, *rest = _lines(part, indent + "    ")
            lines += [f"{indent}  {name}: {first.strip()}", *rest]
        return lines
    return [f"{indent}{policy!r}"]
