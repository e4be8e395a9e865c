"""The JSONL sink: what is written, by whom, and what survives a crash."""

from __future__ import annotations

import contextlib
import gc
import json
import math
import os
import resource
import shutil
import subprocess
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import distclip
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


# ---- a log that cannot be written --------------------------------------------------------------


@contextlib.contextmanager
def no_file_above(size: int) -> Iterator[None]:
    """As on a full disk: a write is cut short at the limit, and the next fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "r"
    with JsonlSink(path) as sink:
        sink(1, Report())
        size = path.stat().st_size
        with no_file_above(size + 20):
            for step in (2, 3, 4):
                sink(step, Report())
                assert path.read_bytes().endswith(b"}\n")  # the cut line was taken back
        assert (sink.lost, [line["step"] for line in lines(path)]) == (3, [1])
        sink(5, Report())
        with no_file_above(path.stat().st_size + 1):
            sink(6, Report())
        sink(7, Report())
    assert [line["step"] for line in lines(path)] == [1, 5, 7]
    told = [record.getMessage() for record in caplog.records]
    assert told == [
        f"the log {path} cannot be written (File too large); training goes on, and every record "
        "tries again",
        f"the log {path} is written again; so far it lacks 3 records",
        f"the log {path} lacks 4 records, which could not be written",
    ]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has /dev/full")
def test_a_device_that_is_always_full(caplog: pytest.LogCaptureFixture) -> None:
    sink = JsonlSink("/dev/full")
    for step in range(3):
        sink(step, Report())
    assert sink.lost == 3
    assert "No space left on device" in caplog.text
    del sink
    gc.collect()
    assert "lacks 3 records" in caplog.records[-1].getMessage()
    assert len(caplog.records) == 2


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounting needs root")
def test_a_full_file_system(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        with JsonlSink(disk / "r") as sink:
            for step in range(400):
                sink(step, Report())
            assert sink.lost > 100
            kept = len(lines(disk / "r"))
            assert kept + sink.lost == 400
            subprocess.run([*mount[:4], "remount,size=64k", *mount[5:]], check=True)
            sink(400, Report())
            assert lines(disk / "r")[-1]["step"] == 400
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_cut_line_that_cannot_be_taken_back_stands_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "r"

    def fail(*args: object) -> None:
        raise PermissionError

    with JsonlSink(path) as sink, monkeypatch.context() as patch:
        patch.setattr(os, "ftruncate", fail)  # an append-only file
        with no_file_above(20):
            sink(1, Report())
        for step in (2, 3):
            sink(step, Report())
    cut, *rest = path.read_text().splitlines()
    assert cut == '{"step": 1, "run": "'
    assert [json.loads(line)["step"] for line in rest] == [2, 3]


def test_another_writers_line_is_not_taken_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "r"
    truncate, seen = os.ftruncate, []
    monkeypatch.setattr(os, "ftruncate", lambda *a: (seen.append(a), truncate(*a)))
    with JsonlSink(path) as sink:
        sink(1, Report())
        log = sink._queue.writer._file
        write = log._file.write

        def writes_half(data: bytes) -> int:
            if seen_half:
                with open(path, "a") as other:
                    other.write("theirs\n")
                raise OSError(28, "No space left on device")
            seen_half.append(1)
            return write(data[:10])

        seen_half: list[int] = []
        sink._queue.writer._file._file = types.SimpleNamespace(
            write=writes_half,
            fileno=sink._queue.writer._file._file.fileno,
            close=sink._queue.writer._file._file.close,
        )
        sink(2, Report())
        sink(3, Report())
    assert seen == []
    first, *_, last = path.read_text().splitlines()
    assert (json.loads(first)["step"], json.loads(last)["step"]) == (1, 3)
    assert "theirs" in path.read_text()


def test_a_folder_that_goes_and_comes_back(tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    with JsonlSink(folder / "r") as sink:
        sink(1, Report())
        shutil.rmtree(folder)
        sink(2, Report())  # makes it anew
        assert [line["step"] for line in lines(folder / "r")] == [2]
        shutil.rmtree(folder)
        folder.write_text("a file in the way")
        sink(3, Report())
        assert sink.lost == 1
        folder.unlink()
        sink(4, Report())
    assert [line["step"] for line in lines(folder / "r")] == [4]


def test_paths_that_are_no_files_to_append_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "file" / "r", tmp_path / "pipe", "x" * 300, "a\udcff/\ud800"):
        sink = JsonlSink(path)
        sink(1, Report())
        assert sink.lost == 1
    with pytest.raises(ConfigurationError, match="NUL"):
        JsonlSink("a\0b")


def test_training_goes_on_without_its_log(caplog: pytest.LogCaptureFixture) -> None:
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    log = {"jsonl": "/proc/none/clip.jsonl"}
    clipper = distclip.from_config(
        {"policy": {"name": "global_norm", "max_norm": 0.1}, "log": log}, model
    )
    clipper.attach(optimizer)
    before = model.weight.detach().clone()
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
    assert not torch.equal(before, model.weight)
    assert clipper.sinks[0].lost == 3
    assert len([r for r in caplog.records if "cannot be written" in r.getMessage()]) == 1


@pytest.mark.parametrize("fused", [False, True])
def test_a_sink_that_raises_leaves_a_whole_clip(fused: bool) -> None:
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused)
    seen: list[tuple[str, int]] = []

    def broken(step: int, report: object) -> None:
        seen.append(("broken", step))
        if step == 0:
            raise RuntimeError("mine")

    clipper = distclip.GradClipper(
        model,
        distclip.policies.zclip(max_norm=0.1),
        sinks=[broken, lambda step, report: seen.append(("other", step))],
    )
    clipper.attach(optimizer)

    def backward() -> None:
        optimizer.zero_grad()
        model(torch.ones(1, 2)).sum().backward()

    before = model.weight.detach().clone()
    backward()
    with pytest.raises(RuntimeError, match="mine"):
        optimizer.step()
    assert torch.equal(model.weight, before)
    assert seen == [("broken", 0), ("other", 0)]
    assert getattr(optimizer, "grad_scale", None) is None
    assert clipper.state_dict()["step"] == 1
    backward()
    optimizer.step()
    assert seen[2:] == [("broken", 1), ("other", 1)]
    assert not torch.equal(model.weight, before)
