"""``distclip suggest``: a threshold from recorded norms."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import typer.testing

from distclip import config, policies
from distclip.cli.app import app
from distclip.errors import ConfigurationError
from tests.monitor.clip_records import record, write

invoke = typer.testing.CliRunner().invoke


def test_what_it_prints_is_a_configuration(tmp_path: Path) -> None:
    norms = np.random.default_rng(0).lognormal(size=300)
    free = {"coefficient": 1.0, "clipped_fraction": 0.0, "threshold": None}
    path = write(tmp_path / "a.jsonl", [record(s, float(n), **free) for s, n in enumerate(norms)])
    for options, want in (
        ([], np.percentile(norms, 90)),
        (["--percentile", "50"], np.median(norms)),
        (["--from", "200"], np.percentile(norms[200:], 90)),
    ):
        result = invoke(app, ["suggest", str(path), *options])
        assert result.exit_code == 0, result.output
        assert result.stderr == ""
        (tmp_path / "p.yaml").write_text(result.stdout)
        policy = config.load(tmp_path / "p.yaml").policy
        assert isinstance(policy, policies.GlobalNorm)
        assert policy.max_norm == pytest.approx(want, rel=6e-3)  # three digits


def test_norms_of_several_runs_count_together_and_nan_not_at_all(tmp_path: Path) -> None:
    one = write(tmp_path / "a.jsonl", [record(s, 1.0) for s in range(60)])
    rest = [record(s, 3.0) for s in range(59)]
    other = write(tmp_path / "b.jsonl", [*rest, record(59, None, nonfinite=["w"])])
    result = invoke(app, ["suggest", str(one), str(other), "--percentile", "100"])
    assert "max_norm: 3}" in result.stdout
    assert "of 119 norms" in result.stdout


def test_what_speaks_against_it_goes_to_standard_error(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [record(s, 2.0, coefficient=0.5) for s in range(10)])
    result = invoke(app, ["suggest", str(path)])
    assert "100% of these steps something was clipped" in result.stderr
    assert "10 steps are few" in result.stderr
    assert "policy: {name: global_norm, max_norm: 2}" in result.stdout


@pytest.mark.parametrize(
    ("norm", "options", "word"),
    [
        (1.0, ["--percentile", "0"], "percentile must be in"),
        (1.0, ["--percentile", "101"], "percentile must be in"),
        (1.0, ["--from", "99"], "0 finite norms from step 99"),
        (0.0, [], "no threshold above 0"),
        (None, [], "0 finite norms"),
    ],
)
def test_where_there_is_none(
    tmp_path: Path, norm: float | None, options: list[str], word: str
) -> None:
    path = write(tmp_path / "a.jsonl", [record(s, norm) for s in range(5)])
    result = invoke(app, ["suggest", str(path), *options])
    assert isinstance(result.exception, ConfigurationError)
    assert word in str(result.exception)


def test_other_percentiles_and_runs_that_differ(tmp_path: Path) -> None:
    free = {"coefficient": 1.0, "clipped_fraction": 0.0, "threshold": None}
    one = write(tmp_path / "a.jsonl", [record(s, 1.0 + s / 100, **free) for s in range(100)])
    other = write(tmp_path / "b.jsonl", [record(s, 4.0, **free) for s in range(100)])
    alone = invoke(app, ["suggest", str(one)])
    assert "# percentile 75: max_norm 1.74 clips 25.0% of these steps" in alone.stdout
    assert alone.stderr == ""
    both = invoke(app, ["suggest", str(one), str(other)])
    assert "the largest of their median norms is 2.68 times the smallest" in both.stderr
