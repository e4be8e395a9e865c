"""The JSONL sink: what is written, by whom, and what survives a crash."""

from __future__ import annotations

import contextlib
import gc
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import distclip
from distclip.errors import ConfigurationError
from distclip.monitor import JsonlSink
from tests.helpers.logs import lines
from tests.monitor.reported import Report


@pytest.fixture(autouse=True)
def no_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)


def test_each_line_is_in_the_file_at_once(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "clip.jsonl"
    with JsonlSink(path) as sink:
        for step in (1, 2):
            sink(step, Report())
            assert len(lines(path)) == step  # before close: a crash now would lose nothing
    first, second = lines(path)
    assert first.pop("run") == second["run"]
    assert first == {
        "step": 1, "state": "normal", "total_norm": 1.5, "skipped": False, "nonfinite": [],
    }  # fmt: skip


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


def test_a_new_run_in_an_old_file_is_not_mixed_with_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "r"
    path.write_text('{"step": 7, "total_norm": 9.0}\n')  # of a version without names of runs
    for steps in ((0, 1, 2), (2, 3), (0, 1)):  # new, resumed from a checkpoint, new
        with JsonlSink(path, every=2) as sink:
            for step in steps:
                sink(step, Report())
    recorded = [(line.get("run"), line["step"]) for line in lines(path)]
    (_, old), (first, _), *_, (last, _) = recorded
    assert old == 7
    assert len({None, first, last}) == 3
    assert recorded == [(None, 7), (first, 0), (first, 2), (first, 2), (last, 0)]
    told = [r.getMessage() for r in caplog.records if "earlier run" in r.getMessage()]
    assert len(told) == 2
    assert f'have "run": "{first}"' in told[0]
    assert f'have "run": "{last}"' in told[1]


def test_the_run_goes_on_after_a_torn_or_a_long_line(tmp_path: Path) -> None:
    path = tmp_path / "r"
    for tail in ('{"step": 9, "tot', "[1]\n", "\n\n", json.dumps({"x": "y" * 70_000})):
        path.write_text('{"step": 8, "run": "mine"}\n' + tail)
        with JsonlSink(path) as sink:
            sink(9, Report())
        assert lines_of_run(path) == [(8, "mine"), (9, "mine")]


def lines_of_run(path: Path) -> list[tuple[int, str]]:
    found = []
    for line in path.read_text().splitlines():
        with contextlib.suppress(ValueError, TypeError, KeyError):
            record = json.loads(line)
            found.append((record["step"], record["run"]))
    return found


class OnItsWay:
    """A report whose copy to the host takes until ``arrived``."""

    def __init__(self) -> None:
        self.ready = False
        self.reads = 0

    def fetch(self, *, per_parameter: bool = True) -> OnItsWay:
        return self

    def __call__(self) -> dict[str, Any]:
        self.reads += 1
        return Report().to_dict(per_parameter=False)


def test_what_is_on_its_way_is_written_at_the_next_step(tmp_path: Path) -> None:
    path = tmp_path / "r"
    reports = [OnItsWay() for _ in range(4)]
    sink = JsonlSink(path, every=2)
    sink(0, reports[0])
    assert (reports[0].reads, path.exists()) == (0, False)  # the hot path has not waited
    sink(1, reports[1])
    assert [report.reads for report in reports] == [1, 0, 0, 0]
    sink(2, reports[2])
    assert [line["step"] for line in lines(path)] == [0]
    sink.close()  # the last one
    assert [line["step"] for line in lines(path)] == [0, 2]


def test_a_forgotten_sink_writes_its_last_record(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sink = JsonlSink(tmp_path / "r")
    sink(0, OnItsWay())
    del sink
    gc.collect()
    assert [line["step"] for line in lines(tmp_path / "r")] == [0]

    class Gone(OnItsWay):
        def __call__(self) -> dict[str, Any]:
            raise RuntimeError("driver shutting down")

    with JsonlSink(tmp_path / "r") as sink:
        sink(1, Gone())
    assert "record of the last step was lost: driver shutting down" in caplog.text


def test_a_report_is_copied_once_for_all_sinks_and_gives_what_to_dict_gives() -> None:
    model = torch.nn.Linear(2, 1)
    seen: list[Any] = []
    clipper = distclip.GradClipper(
        model, distclip.policies.global_norm(0.1), sinks=[lambda step, report: seen.append(report)]
    )
    model(torch.ones(1, 2)).sum().backward()
    clipper.clip_()
    (report,) = seen
    assert report._summary is report._summary
    fetch = report.fetch()
    assert fetch.ready
    for gradient in (p.grad for p in model.parameters()):
        gradient.zero_()  # the report is of the clip
    assert fetch() == report.to_dict()
    assert fetch()["total_norm"] == pytest.approx(math.sqrt(3))
    assert fetch()["parameters"] == {
        name: {"norm": norm, "coefficient": report.parameter_coefficients[name]}
        for name, norm in report.parameter_norms.items()
    }


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
    file = sink._queue.writer._file._file
    assert file is not None
    del sink
    gc.collect()
    assert file.closed


@pytest.mark.parametrize("every", [0, -1, 1.5, True])
def test_every_must_be_a_count(tmp_path: Path, every: Any) -> None:
    with pytest.raises(ConfigurationError, match="every must be an integer >= 1, got"):
        JsonlSink(tmp_path / "r", every)
