"""The pages and examples that name commands and options: those there are, and no other."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from typer.main import get_command

from distclip.cli.app import app

DOCS = Path(__file__).parents[2] / "docs"


def test_every_option_is_in_cli_md_and_no_other() -> None:
    def options(command: Any) -> Iterator[str]:
        for parameter in command.params:
            if not getattr(parameter, "hidden", False):
                yield from (name for name in parameter.opts if name.startswith("-"))
        for sub_command in getattr(command, "commands", {}).values():
            yield from options(sub_command)

    text = (DOCS / "cli.md").read_text(encoding="utf-8")
    wanted = set(options(get_command(app))) - {"--help"}
    documented = set(re.findall(r"^\| .*", text, re.MULTILINE))
    named = {option for row in documented for option in re.findall(r"`(--?[\w-]+)", row)}
    assert named == wanted


def test_the_workflow_is_valid_and_its_commands_exist() -> None:
    workflow = yaml.safe_load((DOCS / "example" / "github-actions.yml").read_text())
    (job,) = workflow["jobs"].values()
    commands = [step["run"].split() for step in job["steps"] if "run" in step]
    ours = {words[1]: words[2:] for words in commands if words[0] == "distclip"}
    assert set(ours) == {"doctor", "verify", "simulate"}
    known = get_command(app).commands  # type: ignore[attr-defined]
    for name, words in ours.items():
        options = {option for parameter in known[name].params for option in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= options
