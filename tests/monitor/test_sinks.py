"""The JSONL sink: what is written, by whom, and what survives a crash."""

from __future__ import annotations

import gc
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from distclip.errors import ConfigurationError
from distclip.monitor import JsonlSink


class Report:
    """Counts how often it is read: reading waits for the device."""

    def __init__(self, norm: float = 1.5) -> None:
        self.norm = norm
        self.reads = 0

    def to_dict(self, *, per_parameter: bool = True) -> dict[str, Any]:
        self.reads += 1
        shown: dict[str, Any] = {"total_norm": self.norm, "skipped": False, "nonfinite": []}
        return {**shown, "parameters": {"w": {"norm": self.norm}}} if per_parameter else shown


@pytest.fixture(autouse=True)
def no_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_line_is_in_the_file_at_once(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "clip.jsonl"
    with JsonlSink(path) as sink:
        for step in (1, 2):
            sink(step, Report())
            assert len(lines(path)) == step  # before close: a crash now would lose nothing
    assert lines(path)[0] == {"step": 1, "total_norm": 1.5, "skipped": False, "nonfinite": []}


def test_every_nth_step_and_nothing_is_read_in_between(tmp_path: Path) -> None:
    report = Report()
    with JsonlSink(tmp_path / "r", every=3, per_parameter=True) as sink:
        for step in range(1, 8):
            sink(step, report)
    assert [line["step"] for line in lines(tmp_path / "r")] == [3, 6]
    assert lines(tmp_path / "r")[0]["parameters"] == {"w": {"norm": 1.5}}
    assert report.reads == 2


@pytest.mark.parametrize("norm", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_null(tmp_path: Path, norm: float) -> None:
    with JsonlSink(tmp_path / "r", per_parameter=True) as sink:
        sink(1, Report(norm))
    (line,) = lines(tmp_path / "r")
    assert (line["total_norm"], line["parameters"]["w"]["norm"]) == (None, None)


def test_a_resumed_run_appends(tmp_path: Path) -> None:
    for steps in ((1, 2), (2, 3)):
        with JsonlSink(tmp_path / "r") as sink:
            for step in steps:
                sink(step, Report())
    assert [line["step"] for line in lines(tmp_path / "r")] == [1, 2, 2, 3]


def test_a_line_cut_by_a_crash_does_not_swallow_the_next(tmp_path: Path) -> None:
    (tmp_path / "r").write_text('{"step": 1}\n{"step": 2, "tot')
    with JsonlSink(tmp_path / "r") as sink:
        sink(3, Report())
    assert json.loads((tmp_path / "r").read_text().splitlines()[-1])["step"] == 3


def test_other_ranks_write_and_read_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = Report()
    monkeypatch.setenv("RANK", "1")
    JsonlSink(tmp_path / "r")(1, report)
    assert not (tmp_path / "r").exists()
    assert report.reads == 0
    # The process group knows better than the environment.
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda group=None: 0)
    with JsonlSink(tmp_path / "r") as sink:
        sink(1, report)
    assert len(lines(tmp_path / "r")) == 1
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(dist, "get_rank", lambda group=None: 1)
    JsonlSink(tmp_path / "r")(2, report)
    assert len(lines(tmp_path / "r")) == 1


def test_closed(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "r")
    sink.close()
    sink.close()
    with pytest.raises(ValueError, match="is closed"):
        sink(1, Report())


def test_a_forgotten_sink_closes_its_file(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "r")
    sink(1, Report())
    file = sink._file
    assert file is not None
    del sink
    gc.collect()
    assert file.closed


@pytest.mark.parametrize("every", [0, -1, 1.5, True])
def test_every_must_be_a_count(tmp_path: Path, every: Any) -> None:
    with pytest.raises(ConfigurationError, match="every must be an integer >= 1, got"):
        JsonlSink(tmp_path / "r", every)


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file" / "r"):
        with pytest.raises(ConfigurationError, match="cannot be written"):
            JsonlSink(path)(1, Report())
