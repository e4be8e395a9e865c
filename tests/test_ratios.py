"""Ratios of gradient to weight, and norms rolled up by module: in the report and in the log."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from distclip import ConfigurationError, GradClipper, config, policies
from distclip.common.rollups import grouped, joint
from distclip.config.logs import open_log
from distclip.integrations import clippers
from distclip.monitor import JsonlSink
from distclip.monitor.page.data import page_data
from distclip.monitor.reading import read_run
from distclip.monitor.summary import summaries
from distclip.monitor.tracking import metrics
from distclip.options import Looks, Options
from distclip.policies import Policy
from distclip.testing.norms import wide
from tests.helpers.command import command
from tests.helpers.watching import REDUCTION, watch
from tests.sharded import Whole, shard, whole

LAYOUTS = ("fsdp2", "hsdp", "tp", "mixed", "fsdp1_mixed", "replicate")
CLIPPING: dict[str, Policy] = {
    "measure": policies.measure(),
    "agc": policies.agc(0.1),  # measures weights per row
    "dreamer": policies.dreamer_agc(0.1),  # measures the same weights
    "sum": policies.global_norm(1.0, 1.0),
    "max": policies.measure(math.inf),
}


def norm(values: Any, order: float) -> float:
    return float(np.linalg.norm(np.ravel(values), order)) if np.size(values) else 0.0


def oracle(values: Whole, order: float, depth: int) -> tuple[dict[str, float], dict[str, float]]:
    """Of whole tensors in float64: ratios by parameter, and by module."""
    gradients = {name: None if g is None else wide(g) for name, g in values.gradients.items()}
    weights = {name: wide(weight) for name, weight in values.weights.items()}
    found: list[dict[str, float]] = []
    for parts in (99, depth):
        groups: dict[str, list[str]] = {}
        for name in weights:
            groups.setdefault(".".join(name.split(".")[:parts]), []).append(name)
        found.append({})
        for path, names in groups.items():
            own = [gradients[n] for n in names]
            gradient = norm(
                np.concatenate([np.ravel(g) for g in own if g is not None] or [[]]), order
            )
            weight = norm(np.concatenate([np.ravel(weights[n]) for n in names]), order)
            found[-1][path] = gradient / weight if weight else math.inf if gradient else math.nan
    return found[0], found[1]


@pytest.mark.ranks(1, 2, 3, 4)
def test_ratios_are_of_whole_tensors_and_cost_no_collective() -> None:
    values = whole("mixed", seed=3)
    alone = dist.get_world_size() == 1
    for number, layout in enumerate(("plain", "plain", "plain") if alone else LAYOUTS):
        for label, policy in [*CLIPPING.items()][number % 3 :: 3]:
            model = shard(layout, values)
            clipper = GradClipper(model.named(), policy, ratios=2, verify_replicas="never")
            each, modules = oracle(values, clipper.norm_type, 1)
            for step in range(3):
                model.set_gradients(values.gradients)
                with watch() as seen:
                    report = clipper.clip_()
                spread = clipper.plan.group is not None
                assert seen.collective_names == [REDUCTION] * spread, (layout, label)
                with watch() as seen:
                    ratios, rolled = report.parameter_ratios, report.module_ratios(1)
                assert seen.collectives == []
                if step == 1:
                    assert (ratios, rolled) == ({}, {})
                    assert math.isnan(report.weight_norm)
                    continue
                assert ratios == pytest.approx(each, rel=1e-6, nan_ok=True), (layout, label)
                assert rolled == pytest.approx(modules, rel=1e-6, nan_ok=True), (layout, label)
                whole_norm = norm(
                    np.concatenate([wide(w).ravel() for w in values.weights.values()]),
                    clipper.norm_type,
                )
                assert report.weight_norm.item() == pytest.approx(whole_norm, rel=1e-6)


def layers() -> nn.Module:
    torch.manual_seed(0)
    model = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 2)])})
    model.head = nn.Linear(2, 2, bias=False)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    return model


def test_norms_by_module() -> None:
    report = GradClipper(layers(), policies.parameter_norm(1.0)).clip_()
    norms = report.parameter_norms
    assert report.module_norms(9) == norms
    by_block = report.module_norms(2)
    assert list(by_block) == ["blocks.0", "blocks.1", "head.weight"]
    assert by_block["blocks.1"] == pytest.approx(
        math.hypot(norms["blocks.1.weight"], norms["blocks.1.bias"])
    )
    assert set(report.module_norms(1)) == {"blocks", "head"}
    shown = report.to_dict(per_parameter=False, modules=1)
    assert "parameters" not in shown
    # The norm after clipping by that before: four parameters of norm 1 at most.
    after = math.sqrt(sum(min(1.0, n) ** 2 for name, n in norms.items() if name[0] == "b"))
    assert shown["modules"]["blocks"] == pytest.approx(
        {"norm": report.module_norms(1)["blocks"], "coefficient": after / by(report, "blocks")}
    )
    for bad in (0, True):
        with pytest.raises(ConfigurationError, match="depth of modules must be an integer >= 1"):
            report.module_norms(bad)


def by(report: Any, path: str) -> float:
    return float(report.module_norms(1)[path])


def test_rolling_up_neither_overflows_nor_hides_nan() -> None:
    parts = np.array([[3e200, 4e200], [3e-200, 4e-200], [0, 0], [np.nan, 1], [np.inf, 1]])
    np.testing.assert_allclose(joint(parts, 2.0), [5e200, 5e-200, 0.0, np.nan, np.inf], rtol=1e-15)
    np.testing.assert_allclose(joint(parts, math.inf)[:2], [4e200, 4e-200])
    assert joint(parts[:, :0], 2.0).tolist() == [0.0] * 5
    assert grouped(["a.b.c", "a.b", "d"], 2) == {"a.b": [0, 1], "d": [2]}


def test_the_log_the_table_and_the_page_have_them(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    document = {"policy": "measure", "ratios": 2, "log": {"jsonl": str(path), "modules": 1}}
    settings = config.load(document)
    clipper = GradClipper(layers(), settings.policy, ratios=settings.ratios)
    open_log(clipper, settings)
    reports = [clipper.clip_() for _ in range(3)]
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert "parameters" not in lines[0]
    assert lines[0]["modules"]["head"]["ratio"] == pytest.approx(
        reports[0].module_ratios(1)["head"]
    )
    assert "ratio" not in lines[1]["modules"]["head"]
    names = metrics(reports[0].to_dict(modules=1))
    assert names["grad_weight_ratio"] == pytest.approx(
        (reports[0].total_norm / reports[0].weight_norm).item()
    )
    assert names["grad_norm/head"] == lines[0]["modules"]["head"]["norm"]
    assert names["grad_weight_ratio/head"] == lines[0]["modules"]["head"]["ratio"]

    each = tmp_path / "each.jsonl"
    with JsonlSink(each, per_parameter=True) as sink:
        for step, report in enumerate(reports):
            sink(step, report)
    found = read_run(each).parameters
    assert found is not None
    assert found.ratios is not None
    assert np.isnan(found.ratios).all(axis=1).tolist() == [False, True, False]
    rolled = found.rolled_up(grouped(found.names, 1))
    for place, (name, want) in enumerate(reports[0].module_norms(1).items()):
        assert rolled.names[place] == name
        assert rolled.norms[0, place] == pytest.approx(want, rel=1e-6)
        assert rolled.ratios is not None
        assert rolled.ratios[2, place] == pytest.approx(reports[2].module_ratios(1)[name], rel=1e-6)
    runs = [read_run(path), read_run(each)]
    shown = [run["parameters"] for run in page_data(runs, summaries(runs))["runs"]]
    assert [one["count"] for one in shown] == [2, 5]
    for one in shown:
        assert one["has_ratios"]
        assert all(row["ratio"] > 0.0 for row in one["most_clipped"])
    run = command("report", str(each), "--modules", "1")
    assert run.code == 0, run.err
    ratio = f"{reports[0].module_ratios(1)['head']:.3g}"
    assert any(
        line.split()[0::4] == ["head", ratio] for line in run.out.splitlines() if "head" in line
    )


def test_a_clipper_that_only_returns_a_norm_measures_no_more() -> None:
    settings = config.load({"policy": "measure", "ratios": 1, "exponents": 1})
    asked = settings.arguments(**clippers._measuring(2.0))
    assert Options(**asked).looks(0) == Looks()


def test_what_cannot_be_meant() -> None:
    document = {"policy": "measure", "ratios": 3, "log": {"jsonl": "x", "every": 2}}
    with pytest.raises(ConfigurationError, match=r"ratios: 3 is no multiple of log.every, 2: .*4"):
        config.load(document)
    with pytest.raises(ConfigurationError, match="modules"):
        config.load({"policy": "measure", "log": {"jsonl": "x", "modules": 0}})
