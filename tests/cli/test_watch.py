"""``distclip watch``: the newest steps, as they come."""

import io
import json
import time
from pathlib import Path

import pytest
import typer.testing
from rich.console import Console

from distclip.cli.app import app
from distclip.errors import ConfigurationError
from distclip.monitor import watching
from distclip.monitor.reading import read_run
from tests.monitor.clip_records import record, write


def test_a_line_for_each_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "r.jsonl"
    out = io.StringIO()
    coming = [record(0, 2.0), record(1, None, nonfinite=["w"], skipped=True), None]

    def another(seconds: float) -> None:
        new = coming.pop(0)
        if new is not None:
            with open(path, "a") as file:
                file.write(json.dumps(new) + "\n")

    monkeypatch.setattr(time, "sleep", another)
    watching.watch_log(path, 1.0, Console(file=out), lambda: bool(coming))
    assert out.getvalue().splitlines() == [
        "step 0: norm 2 -> 1, normal",
        "step 1: norm nan -> nan, nonfinite, skipped",
    ]


def test_the_view_in_a_terminal(tmp_path: Path) -> None:
    lines = [record(s, 1.0 + 0.01 * (s % 7)) for s in range(99)] + [record(99, 60.0)]
    run = read_run(write(tmp_path / "[red]x.jsonl", lines))
    out = io.StringIO()
    Console(file=out, width=100).print(watching.view(run))
    text = out.getvalue()
    assert "[red]x: 100 steps" in text
    assert text.count("│ normal") == watching.STEPS_SHOWN - 1
    assert "spike" in text.splitlines()[-3]
    assert "spike 1; spike score 1%" in text


def test_the_command(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", [record(3, 0.5)])
    invoke = typer.testing.CliRunner().invoke
    assert invoke(app, ["watch", str(path), "--once"]).stdout == "step 3: norm 0.5 -> 0.5, normal\n"
    assert invoke(app, ["watch", str(tmp_path / "none"), "--once"]).exit_code == 0
    path.write_text("not a log\n")
    found = invoke(app, ["watch", str(path), "--once"])
    assert isinstance(found.exception, ConfigurationError)
