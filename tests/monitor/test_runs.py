"""Recorded runs: reading, summing up, the table."""

import io
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from clip_records import record, write

from distclip.errors import ConfigurationError
from distclip.monitor import table
from distclip.monitor.reading import read_loss, read_run, setting_of
from distclip.monitor.summary import Summary


def test_a_run_is_read_in_the_order_of_steps_and_the_last_of_a_step_counts(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", [record(2, 5.0), record(1, 0.5), record(2, 4.0)])
    run = read_run(path)
    assert run.steps.tolist() == [1, 2]
    assert run.total_norm.tolist() == [0.5, 4.0]
    assert run.clipped.tolist() == [False, True]


def test_lines_cut_by_a_crash_are_passed_over(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", [record(1)])
    path.write_text(path.read_text() + '{"step": 2, "total\n' + json.dumps(record(3)) + "\n[1")
    assert read_run(path).steps.tolist() == [1, 3]


@pytest.mark.parametrize(
    "text", ["", "text\n", '{"step": 1, "loss": 2}\n', "[]\n", '{"step": null}']
)
def test_a_file_that_no_sink_wrote(tmp_path: Path, text: str) -> None:
    (tmp_path / "r.jsonl").write_text(text)
    with pytest.raises(ConfigurationError, match=r"r\.jsonl: no line has the keys 'step' and"):
        read_run(tmp_path / "r.jsonl")
    with pytest.raises(ConfigurationError, match="cannot be read"):
        read_run(tmp_path / "nowhere.jsonl")


def test_loss(tmp_path: Path) -> None:
    path = write(tmp_path / "l.jsonl", [{"step": 1, "loss": 2.0}, {"step": 2, "loss": None}])
    curve = read_loss(path, "g")
    assert curve.steps.tolist() == [1, 2]
    np.testing.assert_equal(curve.values, [2.0, math.nan])


@pytest.mark.parametrize(
    ("path", "group"),
    [
        ("agc_seed1.jsonl", "agc"),
        ("agc-s2.jsonl", "agc"),
        ("runs/agc/seed3.jsonl", "agc"),
        ("runs/agc/3.jsonl", "agc/3"),
        ("agc_0.01.jsonl", "agc_0.01"),
        ("global_norm_5.jsonl", "global_norm_5"),
        ("losses1.jsonl", "losses1"),
        ("/seed1.jsonl", "seed1"),
        ("agc.jsonl", "agc"),
        ("adam2.jsonl", "adam2"),
        ("zero/clip.jsonl", "zero/clip"),
    ],
)
def test_groups(path: str, group: str) -> None:
    assert setting_of(path) == group


def test_whether_a_threshold_is_a_norm_is_seen_in_the_record(tmp_path: Path) -> None:
    clipped = write(tmp_path / "a", [record(s, 0.5 + s) for s in range(5)])
    never = write(tmp_path / "b", [record(s, 0.5) for s in range(5)])
    ratio = {"threshold": 0.01, "coefficient": 0.9, "clipped_norm": 0.7}
    agc = write(tmp_path / "c", [record(s, 0.8, **ratio) for s in range(5)])
    ratio = {"threshold": 0.6, "coefficient": 0.9, "clipped_norm": 0.7}
    near = write(tmp_path / "f", [record(s, 0.8, **ratio) for s in range(5)])
    idle = write(tmp_path / "d", [record(s, 0.8, threshold=0.01, coefficient=1) for s in range(5)])
    none = write(tmp_path / "e", [record(s, 0.8, threshold=None) for s in range(5)])
    found = [read_run(path).threshold_is_norm for path in (clipped, never, agc, near, idle, none)]
    assert found == [True, True, False, False, False, False]


def test_summary(tmp_path: Path) -> None:
    records = [record(step, step / 10) for step in range(1, 101)]
    records[0] = record(1, None, skipped=True, nonfinite=["w"], coefficient=0.5)
    summary = Summary.of(read_run(write(tmp_path / "a.jsonl", records)))
    assert summary.steps == 100
    assert summary.percentiles[90] == pytest.approx(np.percentile(np.arange(2, 101) / 10, 90))
    assert (summary.largest, summary.threshold) == (10.0, 1.0)
    assert (summary.clipped, summary.share) == (0.9, 0.9)
    assert (summary.skipped, summary.nonfinite) == (1, 1)
    threshold, rate, nonfinite = summary.advice()
    assert "max_norm: 9.02" in threshold
    assert "90% of all gradients" in rate
    assert "lower the learning rate" in rate
    assert nonfinite.startswith("NaN or inf gradients in 1 of 100 steps")


def test_a_threshold_that_is_never_reached(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [record(step, 0.1) for step in range(3)])
    _, idle = Summary.of(read_run(path)).advice()
    assert "no step came near the threshold 1 (largest norm 0.1)" in idle


def test_policies_that_clip_a_little_in_every_step_are_not_told_to_slow_down(
    tmp_path: Path,
) -> None:
    for share in (0.1, 1.0):  # that is advice for thresholds on norms
        part = {"coefficient": 0.5, "clipped_fraction": share, "threshold": 0.01}
        run = read_run(write(tmp_path / "agc.jsonl", [record(s, 0.8, **part) for s in range(9)]))
        summary = Summary.of(run)
        assert summary.clipped == 1.0
        assert not any("learning rate" in sentence for sentence in summary.advice())


def test_nothing_finite_at_all(tmp_path: Path) -> None:
    bad = {"threshold": None, "clipped_fraction": None, "coefficient": None}
    run = read_run(write(tmp_path / "a.jsonl", [record(1, None, **bad)]))
    summary = Summary.of(run)
    assert math.isnan(summary.percentiles[50])
    out = io.StringIO()
    table.show_runs([summary], out)
    assert out.getvalue().splitlines()[1].split() == [
        "a", "1", "-", "-", "-", "-", "-", "0.0%", "-", "0", "1",
    ]  # fmt: skip


def test_the_table_is_plain_columns_outside_a_terminal(tmp_path: Path) -> None:
    name = "a_rather_long_name_of_a_run_[that]_must_not_be_cut_or_wrapped_in_a_pipe" * 2
    run = read_run(write(tmp_path / f"{name}.jsonl", [record(1, 4.0), record(2, 0.5)]))
    out = io.StringIO()
    table.show_runs([Summary.of(run)], out)
    header, row, *_ = out.getvalue().splitlines()
    assert len(header) == len(row)
    assert row.startswith(f"{name}      2  ")
    assert row.endswith("50.0%          50.0%        0        0")


@pytest.mark.parametrize("columns", [40, 80, 120, 200])
def test_no_number_is_cut_in_a_narrow_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    records = [record(step, 1234.0) for step in range(321)]
    runs = [read_run(write(tmp_path / f"{name}.jsonl", records)) for name in "ab"]
    out = io.StringIO()
    table.show_runs(list(map(Summary.of, runs)), out, terminal=True)
    drawn = out.getvalue().partition("\n\n")[0]
    assert len(re.findall(r"\b321\b", drawn)) == 2
    assert drawn.count("1.23e+03") == 8  # three percentiles and the largest, of two runs


def test_the_table_is_drawn_in_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "140")
    run = read_run(write(tmp_path / "a.jsonl", [record(1, 4.0)]))
    out = io.StringIO()
    table.show_runs([Summary.of(run)], out)
    assert "┃" in out.getvalue()
