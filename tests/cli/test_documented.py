"""The pages and examples that name commands and options: those there are, and no other."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command
from typer.testing import CliRunner

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


def test_help_reads_well_at_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """No line is longer, no summary is cut, and no example of a command is broken."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERMINAL_WIDTH", "80")
    known = get_command(app).commands  # type: ignore[attr-defined]
    names = [[], *([name] for name in known), ["config", "check"], ["config", "schema"]]
    for words in names:
        text = CliRunner().invoke(app, [*words, "--help"], terminal_width=80).output
        lines = text.splitlines()
        assert max(map(len, lines)) <= 80, words
        assert not [line for line in lines if line.endswith("...") and "Usage" not in line], words
        assert not re.search("\u2502|<bool>", text), words
        for number, line in enumerate(lines):
            if line.startswith(("  distclip ", "  torchrun ", "  accelerate ")):
                assert not (lines[number - 1] + lines[number + 1]).strip(), line


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
