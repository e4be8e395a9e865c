"""``distclip suggest``: a threshold from recorded norms."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer.testing

import distclip
from distclip import config, policies
from distclip.cli.app import app
from distclip.common.rollups import grouped
from distclip.errors import ConfigurationError
from distclip.monitor.reading import read_run
from distclip.monitor.summary import Summary
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


def with_ratios(step: int, **of: tuple[float, float | None]) -> dict[str, Any]:
    """A record of a run that clips nothing, with the norm and the ratio of some parameters."""
    each = {n: {"norm": g, "coefficient": 1.0, "ratio": r} for n, (g, r) in of.items()}
    free = {"coefficient": 1.0, "clipped_fraction": 0.0, "threshold": None}
    return record(step, 1.0, parameters=each, **free)


def test_a_factor_for_agc_clips_what_it_says(tmp_path: Path) -> None:
    """The policy itself, on gradients and weights of these norms."""
    generator = np.random.default_rng(1)
    gradients = generator.lognormal(-3.0, 1.0, (120, 4))
    weights = np.tile([1.0, 2.0, 0.0, 5e-4], (120, 1))  # one is 0, and one below the floor
    gradients[:, 2:] *= 1e-3
    gradients[3, 1:3] = 0.0  # do not count, whatever the weight
    lines = []
    for step, row in enumerate(gradients.tolist()):
        pairs = zip(row, weights[step].tolist(), strict=True)
        of = {f"p{n}": (g, g / w if w else None) for n, (g, w) in enumerate(pairs)}
        lines.append(with_ratios(step, **of))
    path = write(tmp_path / "a.jsonl", lines)
    result = invoke(app, ["suggest", str(path), "--policy", "agc", "--percentile", "95"])
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    (tmp_path / "p.yaml").write_text(result.stdout)
    assert config.load(tmp_path / "p.yaml").policy == policies.agc(
        float(result.stdout.split("clip_factor: ")[1].split(",")[0]), unit="tensor"
    )
    found = re.findall(
        r"clip_factor (\S+) clips (\S+)% of the gradients, something in (\S+)% of these steps",
        result.stdout,
    )
    assert len(found) == 5
    assert "of 478 ratios in 120 steps" in result.stdout
    for factor, of_gradients, of_steps in found:
        policy = policies.agc(float(factor), unit="tensor")
        clipped = policy.unit_coefficients(torch.tensor(gradients), torch.tensor(weights)) < 1
        # The factor has three digits: at the threshold itself one or two gradients more or fewer.
        assert 100 * clipped.sum() / 478 == pytest.approx(float(of_gradients), abs=0.5)
        assert 100 * clipped.any(1).double().mean() == pytest.approx(float(of_steps), abs=1.0)


def test_ratios_of_some_steps_and_runs_that_differ(tmp_path: Path) -> None:
    records = [with_ratios(s, a=(1.0, 0.5), b=(1.0, 0.1)) for s in range(0, 200, 2)]
    del records[0]["parameters"]["a"]["ratio"], records[0]["parameters"]["b"]["ratio"]
    one = write(tmp_path / "a.jsonl", records)
    other = write(
        tmp_path / "b.jsonl",
        [
            {**with_ratios(s, a=(1.0, 2.0), b=(1.0, 1.0)), "clipped_fraction": float(s < 30)}
            for s in range(60)
        ],
    )
    result = invoke(app, ["suggest", str(one), str(other), "--policy", "agc"])
    assert "of 318 ratios in 159 steps" in result.stdout
    assert "in 19% of these steps something was clipped: their ratios" in result.stderr
    assert "the largest of their median ratios is 5 times the smallest" in result.stderr


def test_a_log_without_ratios_says_how_to_record_them(tmp_path: Path) -> None:
    norms = {"w": {"norm": 1.0, "coefficient": 1.0}}
    of_modules = {"layers": {"norm": 1.0, "coefficient": 1.0, "ratio": 0.5}}
    for more in ({}, {"parameters": norms}, {"modules": of_modules}):
        path = write(tmp_path / "a.jsonl", [record(s, 1.0, **more) for s in range(5)])
        result = invoke(app, ["suggest", str(path), "--policy", "agc"])
        assert isinstance(result.exception, ConfigurationError)
        assert "ratios: 1" in str(result.exception)
        assert "per_parameter: true" in str(result.exception)


@pytest.mark.parametrize("order", [1.0, "inf"])
def test_norms_of_another_order(tmp_path: Path, order: object) -> None:
    """They roll up by that order, and say nothing about AGC's factor."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1))
    log = {"jsonl": str(tmp_path / "a.jsonl"), "per_parameter": True}
    policy = {"name": "measure", "norm_type": order}
    clipper = distclip.from_config({"policy": policy, "ratios": 1, "log": log}, model)
    model(torch.ones(3)).sum().backward()
    report = clipper.clip_()
    clipper.sinks[0].close()
    kept = read_run(tmp_path / "a.jsonl").parameters
    assert kept is not None
    rolled = kept.rolled_up(grouped(kept.names, 1))
    assert dict(zip(rolled.names, rolled.norms[0].tolist(), strict=True)) == pytest.approx(
        report.module_norms(1)
    )
    result = invoke(app, ["suggest", str(tmp_path / "a.jsonl"), "--policy", "agc"])
    assert f"are of order {float(order):g}, and AGC compares 2-norms" in str(result.exception)  # type: ignore[arg-type]


def test_the_configuration_that_it_names_records_ratios(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = torch.nn.Linear(3, 2)
    log = {"jsonl": "a.jsonl", "per_parameter": True}
    clipper = distclip.from_config({"policy": "measure", "ratios": 1, "log": log}, model)
    for _ in range(3):
        model(torch.ones(3)).sum().backward()
        clipper.clip_()
    for sink in clipper.sinks:
        sink.close()
    result = invoke(app, ["suggest", "a.jsonl", "--policy", "agc"])
    assert result.exit_code == 0, result.output
    assert "of 6 ratios in 3 steps" in result.stdout


@pytest.mark.parametrize("norm", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("steps", [9, 200])
def test_the_advice_is_what_suggest_suggests(tmp_path: Path, norm: float, steps: int) -> None:
    clipped = {} if norm > 1.0 else {"coefficient": 1.0, "clipped_fraction": 0.0}
    path = write(tmp_path / "a.jsonl", [record(s, norm, **clipped) for s in range(steps)])
    suggested = invoke(app, ["suggest", str(path)])
    advice = Summary.of(read_run(path)).advice()
    if norm == 0.0:
        assert isinstance(suggested.exception, ConfigurationError)
        assert not any("max_norm" in sentence for sentence in advice)
        return
    doubts = [line.removeprefix("distclip: ") for line in suggested.stderr.splitlines()]
    assert len(doubts) == (norm > 1.0) + (steps < 100)
    assert advice[0].partition("norms: ")[2] == "; ".join(
        [*suggested.stdout.splitlines()[-1:], *doubts]
    )
