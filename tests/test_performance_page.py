"""docs/performance.md shows what the recorded runs hold, and as many as there are."""

import math

import pytest

from benchmarks import history
from distclip.tools.bench.record import CaseRecord, Record, WayRecord


def test_the_page_is_made_from_the_recorded_runs() -> None:
    text = history.PAGE.read_text(encoding="utf-8")
    runs = history.recorded()
    assert len(runs) > 5
    assert history.page(text, runs) == text, "run `python -m benchmarks.history`"


def case(**wall: list[float]) -> CaseRecord:
    ways = {name.replace("__", " "): WayRecord(ms, ms, 0) for name, ms in wall.items()}
    return CaseRecord("a case", "torch a", 0, {}, ways)


def run(date: str, **cases: CaseRecord) -> Record:
    return Record({"date": date, "processor": "p", "torch": "t"}, 2, cases)


def test_ratios_are_medians_of_rounds_and_bold_where_slower() -> None:
    one = case(torch__a=[2.0, 9.0, 4.0], distclip__clip_=[1.0, 3.0, 8.0], Composer=[1.0, 3.0, 2.0])
    assert history.times(one, "torch a", "distclip clip_") == 2.0
    assert math.isnan(history.times(one, "torch a", None))
    shown = history.newest({"x.json": run("2026-01-01", one=one)})
    assert shown.splitlines()[-1] == "| a case | torch a |  | 2.00 | 1.00, Composer |"
    slow = case(torch__a=[1.0], distclip__clip_=[2.0])
    assert "| **0.50** |" in history.newest({"x.json": run("2026-01-01", one=slow)})


def test_a_policy_of_deepspeed_is_no_function() -> None:
    ways = {name: [1.0] for name in ("DeepSpeed's own", "distclip global_norm", "distclip agc")}
    assert history.ways_of(case(**ways)) == ("distclip global_norm", None)


def test_a_floor_is_no_peer_and_one_run_is_no_history() -> None:
    floor = CaseRecord("floor", "one read", 0, {}, {"one read": WayRecord([1.0], [1.0], 0)})
    new = case(**{"torch__a": [2.0], "GradClipper(a)": [1.0]})
    last = run("2026-01-02T10:00", new=new, floor=floor)
    assert list(history.compared(last)) == ["new"]
    runs = {"a": run("2026-01-01T10:00", new=new), "b": last}
    assert history.history(runs).splitlines()[-1] == "| a case | 2.00 | 2.00 |"
    runs["a"] = run("2026-01-01T10:00", other=new)
    assert "a case" not in history.history(runs)


def test_a_page_without_its_marks_is_refused() -> None:
    with pytest.raises(AssertionError, match="newest"):
        history.page("text", history.recorded())
