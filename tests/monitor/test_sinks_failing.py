"""Sinks that cannot write: training goes on, and no line is damaged."""

import contextlib
import gc
import json
import os
import resource
import shutil
import subprocess
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import distclip
from distclip.errors import ConfigurationError
from distclip.monitor import JsonlSink
from tests.helpers.logs import lines
from tests.monitor.reported import Report


@pytest.fixture(autouse=True)
def no_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)


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
