"""Pictures: what is drawn; and the command that draws them."""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clip_records import record, write

from distclip import monitor
from distclip.errors import ConfigurationError, DistclipError
from distclip.monitor import plots
from distclip.monitor.reading import read_loss, read_run
from distclip.monitor.runs import Curve, Run
from tests.helpers.command import command

pytest.importorskip("matplotlib")


@pytest.fixture
def runs(tmp_path: Path) -> list[Run]:
    """Two settings of two seeds each; one step without a finite norm, one with a norm of zero."""
    made = []
    for name, scale in (("a", 1.0), ("b", 3.0)):
        for seed in range(2):
            records = [record(s, scale * (1 + seed + s % 5)) for s in range(1, 60)]
            records[7] = record(8, None, nonfinite=["w"])
            records[9] = record(10, 0.0)
            made.append(read_run(write(tmp_path / f"{name}_seed{seed}.jsonl", records)))
    return made


@pytest.fixture
def losses(runs: list[Run]) -> list[Curve]:
    return [Curve(run.group, run.steps, run.steps / 10) for run in runs]


def test_panels_labels_and_units(runs: list[Run], losses: list[Curve]) -> None:
    figure = plots.draw(runs, losses)
    assert [axes.get_title("left") for axes in figure.axes] == [
        "Loss", "Clipped share of the parameters", "Gradient norm, a", "Gradient norm, b",
    ]  # fmt: skip
    assert all(axes.get_ylabel() for axes in figure.axes)
    assert figure.axes[-1].get_xlabel() == "optimizer step"
    assert [axes.get_yscale() for axes in figure.axes] == ["linear", "linear", "log", "log"]
    assert [axes.get_title("left") for axes in plots.draw(runs[:1]).axes] == [
        "Gradient norm", "Clipped share of the parameters",
    ]  # fmt: skip


def test_seeds_are_thin_and_their_mean_is_thick(runs: list[Run], losses: list[Curve]) -> None:
    loss = plots.draw(runs, losses).axes[0]
    assert [line.get_linewidth() for line in loss.lines] == [0.7, 0.7, 2, 0.7, 0.7, 2]
    assert len({line.get_color() for line in loss.lines}) == 2
    legend = loss.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["a, mean of 2", "b, mean of 2"]


def test_the_mean_is_over_what_is_finite(runs: list[Run]) -> None:
    first, second = runs[0], runs[1]
    steps, mean = plots._mean(
        [
            Curve("a", first.steps, first.total_norm),
            Curve("a", second.steps[3:], second.total_norm[3:]),
        ]
    )
    assert steps.tolist() == second.steps[3:].tolist()
    assert mean[0] == (first.total_norm[3] + second.total_norm[3]) / 2
    step, gap = np.array([1.0]), np.array([np.nan])
    assert plots._mean([Curve("a", step, gap), Curve("a", step, step)])[1].tolist() == [1.0]
    assert np.isnan(plots._mean([Curve("a", step, gap), Curve("a", step, gap)])[1]).all()


def test_thresholds_and_marks_are_labelled(runs: list[Run]) -> None:
    legend = plots.draw(runs[:1]).axes[0].get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == [
        "before clipping", "after clipping", "threshold 1", "skipped or not finite",
    ]  # fmt: skip


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_save(runs: list[Run], tmp_path: Path, suffix: str) -> None:
    plots.save(plots.draw(runs[:1]), tmp_path / "new" / f"p.{suffix}")
    assert (tmp_path / "new" / f"p.{suffix}").stat().st_size > 1000


def test_a_format_that_there_is_not(runs: list[Run], tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="picture cannot be written"):
        plots.save(plots.draw(runs[:1]), tmp_path / "p.doc")


def test_without_matplotlib(runs: list[Run], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(DistclipError, match=r"pip install 'distclip\[plot\]'"):
        plots.draw(runs)


def test_a_loss_may_stop_early(runs: list[Run], tmp_path: Path) -> None:
    log = write(tmp_path / "log.jsonl", [{"step": 1, "loss": 2.0}])
    plots.save(plots.draw(runs[:1], [read_loss(log, runs[0].group)]), tmp_path / "p.png")


# ---- distclip report -------------------------------------------------------------------------


def test_report(runs: list[Run], tmp_path: Path) -> None:
    files = [str(tmp_path / f"{run.name}.jsonl") for run in runs[:2]]
    log = write(tmp_path / "log.jsonl", [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}])
    arguments = ["--loss", str(log), "--loss", str(log), "--out", str(tmp_path / "p.png")]
    result = command("report", *files, *arguments)
    assert result.code == 0, result.err
    assert "norm p90" in result.out
    assert "policy: {name: global_norm, max_norm: " in result.out
    assert (tmp_path / "p.png").stat().st_size > 1000


def test_report_refuses_losses_that_belong_to_no_run(runs: list[Run], tmp_path: Path) -> None:
    files = [str(tmp_path / f"{run.name}.jsonl") for run in runs[:2]]
    result = command("report", *files, "--loss", files[0], "--out", "p.png")
    assert "1 --loss for 2 runs" in result.err
    result = command("report", files[0], "--loss", files[0])
    assert "name one with --out" in result.err


def test_a_run_that_blows_up_does_not_hide_the_others(runs: list[Run]) -> None:
    norms = np.full(len(runs[0].steps), 1e12)
    norms[:15], norms[-1] = 1.0, np.nan
    blown = dataclasses.replace(runs[0], group="lost", total_norm=norms)
    kept = dataclasses.replace(runs[1], group="kept")
    figure = plots.draw([blown, kept])
    panels = [axes for axes in figure.axes if axes.get_title("left").startswith("Gradient norm")]
    assert all(axes.get_ylim()[1] < 1e6 for axes in panels)
    assert any("goes on to 1e+12" in text.get_text() for axes in panels for text in axes.texts)


def test_in_a_notebook(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", [record(s, 1.0 + s) for s in range(9)])
    figure: Any = monitor.plot(path, title="mine")
    # IPython knows pyplot's figures only, and would show the name of the class.
    assert figure._repr_png_().startswith(b"\x89PNG")
    assert figure.get_suptitle() == "mine"
    with pytest.raises(ConfigurationError, match="path of a log"):
        monitor.plot()
