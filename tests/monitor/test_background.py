"""Trackers whose calls wait for another process: the training does not, and no record is lost."""

from __future__ import annotations

import os
import textwrap
import threading
import time
from pathlib import Path

import pytest
from reported import Report

from distclip.monitor import JsonlSink, background
from distclip.monitor.tracking import TrackerSink
from tests.helpers.processes import python, well


class Slow:
    """Logs when it is let to; every third step is an error."""

    waits = True

    def __init__(self, fails: bool = False) -> None:
        self.logged: list[int] = []
        self.threads: set[int] = set()
        self.closed = 0
        self.go = threading.Event()
        self._fails = fails

    def open(self, first: int) -> None:
        self.threads.add(threading.get_ident())

    def log(self, step: int, values: dict[str, float]) -> None:
        assert self.go.wait(30)
        if self._fails and step % 3 == 0:
            raise OSError("no route")
        self.logged.append(step)

    def close(self) -> None:
        self.closed += 1


class Numbers(Report):
    def to_dict(self, *, per_parameter: bool = True) -> dict[str, object]:
        return {"total_norm": 1.0, "threshold": 1.0, "nonfinite": []}


def sink_of(tracker: Slow) -> TrackerSink:
    return TrackerSink(tracker, 1, False, "", None)


def test_the_training_does_not_wait_and_the_end_does() -> None:
    tracker = Slow()
    sink = sink_of(tracker)
    for step in range(20):
        sink(step, Numbers())
    assert tracker.logged == []
    assert tracker.threads == {threading.get_ident()}  # trackers know their run by its thread
    tracker.go.set()
    sink.close()
    assert tracker.logged == [*range(20)]
    assert (tracker.closed, sink.lost) == (1, 0)
    assert "distclip sink" not in {thread.name for thread in threading.enumerate()}


def test_what_it_raises_and_what_it_cannot_take_is_counted(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = Slow(fails=True)
    tracker.go.set()
    with sink_of(tracker) as sink:
        for step in range(9):
            sink(step, Numbers())
    assert tracker.logged == [1, 2, 4, 5, 7, 8]
    assert sink.lost == 3
    assert [r.getMessage() for r in caplog.records if "took no record" in r.getMessage()] == [
        "TrackerSink took no record (OSError: no route); training goes on, and later records try "
        "again"
    ]
    monkeypatch.setattr(background, "MOST_WAITING", 4)
    tracker = Slow()
    sink = sink_of(tracker)
    for step in range(20):
        sink(step, Numbers())
    assert sink.lost in (15, 16)  # one may be with the tracker already
    tracker.go.set()
    sink.close()
    assert len(tracker.logged) == 20 - sink.lost


def test_a_tracker_that_never_answers_does_not_keep_the_process(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(background, "CLOSE_LIMIT", 0.2)
    tracker = Slow()
    sink = sink_of(tracker)
    for step in range(5):
        sink(step, Numbers())
    sink.close()
    assert sink.lost == 5  # with the one that is being logged
    assert "it does not answer" in caplog.text
    tracker.go.set()


def test_nor_does_one_that_never_closes(monkeypatch: pytest.MonkeyPatch) -> None:
    class Dead(Slow):
        def close(self) -> None:
            assert self.go.wait(30)
            super().close()

    monkeypatch.setattr(background, "CLOSE_LIMIT", 0.2)
    tracker = Dead()
    sink = sink_of(tracker)
    sink(0, Numbers())
    while sink._queue.writer._background._records.qsize():  # type: ignore[attr-defined]
        time.sleep(0.001)
    begin = time.monotonic()
    sink.close()
    assert time.monotonic() - begin < 10
    assert (tracker.closed, sink.lost) == (0, 1)
    tracker.go.set()


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_fork_neither_waits_for_the_thread_nor_ends_the_run() -> None:
    tracker = Slow()
    tracker.go.set()
    sink = sink_of(tracker)
    sink(0, Numbers())
    child = os.fork()
    if child == 0:  # a data loader's worker, or what goes on with the training
        sink(1, Numbers())
        sink._queue.writer._background.drain()  # type: ignore[attr-defined]
        sink.close()
        os._exit(10 * tracker.closed + len(tracker.logged[-1:]) + (tracker.logged[-1] != 1))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
    sink.close()
    assert (tracker.logged, tracker.closed) == ([0], 1)


def test_what_waits_at_the_end_of_the_process_is_written(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(
        textwrap.dedent(
            """
            import atexit, time
            from distclip.monitor.tracking import TrackerSink

            class Tracker:
                waits = True
                running = True
                def open(self, first):
                    atexit.register(self.finish)
                def finish(self):
                    self.running = False
                def log(self, step, values):
                    time.sleep(0.05)
                    print(step, self.running, flush=True)
                def close(self):
                    print("closed", flush=True)

            class Report:
                def to_dict(self, *, per_parameter):
                    return {"total_norm": 1.0, "threshold": 1.0, "nonfinite": []}

            sink = TrackerSink(Tracker(), 1, False, "", None)
            for step in range(5):
                sink(step, Report())
            """
        )
    )
    told = well(python(str(script), timeout=60))
    assert told.split("\n") == [*(f"{n} True" for n in range(5)), "closed", ""]


class Device(Numbers):
    """Of an accelerator: the record is written at the next step, or at the end."""

    ready = False

    def fetch(self, **_: object) -> Device:
        return self

    def __call__(self) -> dict[str, object]:
        return self.to_dict()


def test_a_first_record_at_the_end_of_the_process_is_logged_without_a_thread(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Python 3.12 and later start no thread then."""

    def start(self: threading.Thread) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    tracker = Slow()
    tracker.go.set()
    sink = sink_of(tracker)
    sink(0, Device())
    assert tracker.logged == []
    monkeypatch.setattr(threading.Thread, "start", start)
    sink.close()
    assert (tracker.logged, tracker.closed, sink.lost) == ([0], 1, 0)
    assert caplog.text == ""


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_fork_that_ends_does_not_write_the_record_that_waits(tmp_path: Path) -> None:
    path = tmp_path / "clip.jsonl"
    sink = JsonlSink(path)
    sink(0, Device())
    child = os.fork()
    if child == 0:
        try:
            sink.close()  # as at the end of the process
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert not path.exists()
    sink.close()
    assert path.read_text().count("\n") == 1
