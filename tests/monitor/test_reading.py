"""Files with several runs, parameters, other names; of a large file a part."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clip_records import record, write

from distclip.monitor import reading
from distclip.monitor.reading import read_run, read_runs
from distclip.monitor.states import STATES
from distclip.monitor.summary import Summary


def with_parameters(step: int, **norms: float | None) -> dict[str, Any]:
    entries = {name: {"norm": norm, "coefficient": 0.5} for name, norm in norms.items()}
    return record(step, parameters=entries)


def test_runs_of_one_file_are_kept_apart(tmp_path: Path) -> None:
    records = [record(9, 4.0), *(record(s, 1.0 + s, run="a") for s in range(3)), record(0, run="b"),
               record(1, 7.0, run="a")]  # fmt: skip
    runs = read_runs(write(tmp_path / "mine.jsonl", records))
    assert [run.name for run in runs] == ["mine #1", "mine #2", "mine #3"]
    assert [run.steps.tolist() for run in runs] == [[9], [0, 1, 2], [0]]
    assert runs[1].total_norm.tolist() == [1.0, 7.0, 3.0]
    assert read_run(tmp_path / "mine.jsonl").steps.tolist() == [0]


def test_the_names_of_trackers_are_read(tmp_path: Path) -> None:
    lines = [{"step": 1, "grad_norm": 4.0, "grad_norm_clipped": 1.0, "clip_coefficient": 0.25,
              "clip_threshold": 1.0, "clipped_fraction": 1.0, "step_skipped": 0.0, "nonfinite": 0},
             {"step": 2, "grad_norm": math.nan, "step_skipped": 1.0, "nonfinite": 2.0}]  # fmt: skip
    run = read_run(write(tmp_path / "r", lines))
    assert run.total_norm.tolist()[0] == 4.0
    assert (run.clipped_norm[0], run.coefficient[0], run.threshold[0]) == (1.0, 0.25, 1.0)
    assert (run.skipped.tolist(), run.nonfinite.tolist()) == ([False, True], [False, True])


def test_a_norm_is_a_number_or_null(tmp_path: Path) -> None:
    norms: list[Any] = ["x", 1.0, math.inf, None, math.nan, True, [2.0], 10**400]
    lines = [{"step": step, "total_norm": norm} for step, norm in enumerate(norms)]
    run = read_run(write(tmp_path / "r", lines))
    assert run.steps.tolist() == [1, 2, 3, 4, 7]
    assert run.nonfinite.tolist() == [False, True, True, True, True]


def test_parameters(tmp_path: Path) -> None:
    records = [with_parameters(2, a=1.0, b=2.0), with_parameters(1, b=4.0, c=None),
               with_parameters(2, a=3.0, b=math.inf), record(3)]  # fmt: skip
    records.append(record(4, parameters={"a": 3, "b": {"norm": "x"}}))
    found = read_run(write(tmp_path / "r", records)).parameters
    assert found is not None
    assert found.names == ["a", "b", "c"]
    assert found.steps.tolist() == [1, 2]
    nan = math.nan
    np.testing.assert_equal(found.norms, np.array([[nan, 4.0, nan], [3.0, nan, nan]], np.float32))
    np.testing.assert_equal(
        found.coefficients, np.array([[nan, 0.5, 0.5], [0.5, 0.5, nan]], np.float32)
    )


def test_of_a_large_file_the_parameters_of_some_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = [with_parameters(s, a=float(s + 1), b=1.0) for s in range(20)]
    records[7] = {"extra": {"deep": 1, "parameters": {"x": 1}}, **records[7]}  # not what it seems
    path = write(tmp_path / "r", records)
    whole = read_run(path)
    monkeypatch.setattr(reading, "PARSED", path.stat().st_size // 4)
    part = read_run(path)
    assert part.steps.tolist() == whole.steps.tolist() == list(range(20))
    assert np.array_equal(part.total_norm, whole.total_norm)
    assert whole.parameters is not None
    assert part.parameters is not None
    assert len(whole.parameters.steps) == 20
    assert part.parameters.steps.tolist() == [0, 5, 7, 10, 15]
    assert part.parameters.norms[:, 0].tolist() == [1.0, 6.0, 8.0, 11.0, 16.0]


def test_states_are_read_or_else_judged(tmp_path: Path) -> None:
    norms = [1.0] * 50 + [40.0, math.nan, 1.0]
    lines = [record(s, None if math.isnan(n) else n) for s, n in enumerate(norms)]
    judged = read_run(write(tmp_path / "judged", lines))
    told = read_run(write(tmp_path / "told", [{**line, "state": "vanishing"} for line in lines]))
    odd = read_run(write(tmp_path / "odd", [{**line, "state": [line]} for line in lines]))
    assert [STATES[code] for code in judged.states[-4:]] == [
        "normal", "spike", "nonfinite", "normal",
    ]  # fmt: skip
    assert {STATES[code] for code in told.states} == {"vanishing"}
    assert odd.states.tolist() == judged.states.tolist()
    assert Summary.of(judged).states == {"normal": 51, "spike": 1, "nonfinite": 1}


def test_the_first_nan_is_that_of_the_earliest_step(tmp_path: Path) -> None:
    records = [record(5, None, nonfinite=["late"]), record(2, None, nonfinite=["w\x1b[2J", "v"])]
    assert read_run(write(tmp_path / "r", records)).first_bad == (2.0, ("w\\x1b[2J", "v"))
    (tmp_path / "s").write_text(json.dumps(record(1)))
    assert read_run(tmp_path / "s").first_bad is None
