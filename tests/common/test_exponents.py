"""Histograms of binary exponents: of whole tensors, each element once, in the one all-reduce."""

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from distclip import ConfigurationError, GradClipper, config, policies
from distclip.common.exponents import COLUMNS, LOWEST, from_log, of_row
from distclip.config.logs import open_log
from distclip.monitor import page
from distclip.monitor.page.data import page_data
from distclip.monitor.reading import read_run
from distclip.monitor.summary import summaries
from distclip.monitor.tracking import metrics
from tests.helpers.command import command
from tests.helpers.exponents import oracle, shown
from tests.helpers.watching import REDUCTION, watch
from tests.monitor.clip_records import record, write
from tests.sharded import Whole, shard, whole

LAYOUTS = ("fsdp2", "hsdp", "tp", "fsdp2_tp", "mixed", "fsdp1", "replicate")


def planted() -> Whole:
    """Mixed dtypes, one gradient missing, one all zero; subnormals, NaN and inf in several."""
    values = whole("mixed", seed=5)
    for number, gradient in enumerate(values.gradients.values()):
        if gradient is not None and gradient.numel() > 4 and number % 2:
            flat = gradient.view(-1)
            flat[:: number + 2] = torch.finfo(gradient.dtype).tiny / 4
            flat[-1], flat[1] = torch.inf, 0.0
    return values


@pytest.mark.ranks(1, 2, 3, 4)
def test_whole_tensors_under_every_sharding_in_one_all_reduce() -> None:
    values = planted()
    want = {n: oracle(g) for n, g in values.gradients.items() if g is not None}
    alone = dist.get_world_size() == 1
    by_turns = (policies.global_norm(1.0), policies.agc(0.1), policies.value(0.1))
    for number, layout in enumerate(("plain",) * 3 if alone else LAYOUTS):
        model = shard(layout, values)
        clipper = GradClipper(
            model.named(),
            by_turns[number % 3],
            exponents=2,
            on_nonfinite="pass",
            verify_replicas="never",
        )
        here = dict(want)
        if layout == "fsdp1":  # one flat gradient, in which what is missing is 0
            name = "unused.weight"
            here[name] = oracle(torch.zeros_like(values.weights[name]))
        for step in range(3):
            model.set_gradients(values.gradients)
            with watch() as seen:
                report = clipper.clip_()
            calls, spread = seen.collective_names, clipper.plan.group is not None
            # A message that is longer than gloo's ranks gather is reduced by one all-reduce too.
            assert calls in ([REDUCTION] * spread, ["allreduce_"] * spread), (layout, calls)
            with watch() as seen:
                found, joined = report.exponents, report.exponents_by_dtype
            assert seen.collectives == []
            if step == 1:
                assert found == joined == {}
                continue
            assert {name: shown(each) for name, each in found.items()} == here, layout
            for dtype, all_of_it in joined.items():
                parts = [found[n] for n, each in here.items() if each["dtype"] == dtype]
                assert all_of_it.counts.tolist() == sum(part.counts for part in parts).tolist()
                assert all_of_it.elements == sum(part.elements for part in parts)
                assert all_of_it.zero == sum(part.zero for part in parts)


@pytest.mark.ranks(2)
def test_nothing_else_changes_and_what_needs_nothing_else_reduces_when_it_counts() -> None:
    values = whole(seed=1)
    want = {n: oracle(g) for n, g in values.gradients.items() if g is not None}
    for policy in (policies.agc(0.1), policies.global_norm(1.0), policies.value(0.3)):
        clipped = []
        for options in (
            {},
            {"exponents": 1, "ratios": 1},
            {"exponents": 1, "norms": False, "on_nonfinite": "pass"},
        ):
            model = shard("fsdp2", values)
            model.set_gradients(values.gradients)
            report = GradClipper(model.named(), policy, **options).clip_()
            found = {name: shown(each) for name, each in report.exponents.items()}
            assert found == (want if options else {})
            clipped.append([part for _, part in model.local_gradients()])
        for other in clipped[1:]:
            torch.testing.assert_close(other, clipped[0], rtol=0, atol=0)


def test_shares_near_the_ends() -> None:
    gradient = torch.tensor([0.0, 2.0**-24, 2.0**-14, 2.0**-11, 2.0**-10, 1.0, 2.0**12, 2.0**11])
    for dtype in (torch.float16, torch.float32):
        parameter = nn.Parameter(torch.zeros(8, dtype=dtype))
        parameter.grad = gradient.to(dtype)
        report = GradClipper([("w", parameter)], policies.measure(), exponents=1).clip_()
        found = report.exponents["w"]
        assert found.near_underflow(dtype="float16") == 3 / 8  # 2**-24, 2**-14, 2**-11
        assert found.near_underflow(0, dtype="float16") == 1 / 8
        assert found.near_overflow(dtype="float16") == 1 / 8
        assert found.near_overflow(5, dtype="float16") == 2 / 8
        own = 3 / 8 if dtype is torch.float16 else 0.0
        assert found.near_underflow() == own
        assert found.near_underflow(dtype="bfloat16") == found.near_overflow(dtype="float64") == 0.0
        assert found.elements == 8
        again = from_log(found.dtype, json.loads(json.dumps(found.to_dict())))
        assert again is not None
        for binades in (0, 4, 200):
            for other in ("float16", "bfloat16", "float64", None):
                assert again.near_underflow(binades, other) == found.near_underflow(binades, other)
                assert again.near_overflow(binades, other) == found.near_overflow(binades, other)
        for kept in (pickle.loads(pickle.dumps(report)), copy.deepcopy(report)):
            assert shown(kept.exponents["w"]) == shown(found)


def test_the_log_the_table_and_the_page_have_them(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    small = nn.Parameter(torch.ones(1000, dtype=torch.float16))
    large = nn.Parameter(torch.ones(1000, dtype=torch.float16))
    document = {"policy": "measure", "exponents": 2, "log": {"jsonl": str(path)}}
    settings = config.load(document)
    clipper = GradClipper(
        [("small", small), ("large", large)], settings.policy, exponents=settings.exponents
    )
    open_log(clipper, settings)
    for step in range(5):
        small.grad = torch.full((1000,), 2.0 ** -(10 + step), dtype=torch.float16)
        large.grad = torch.linspace(1.0, 100.0, 1000).half()
        clipper.clip_()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert ["exponents" in line for line in lines] == [True, False, True, False, True]
    last = lines[-1]["exponents"]["float16"]
    assert last["lowest"] == -14
    assert last["counts"][0] == 1000
    assert last["nearest"] == {"small": 1.0}
    assert lines[0]["exponents"]["float16"]["nearest"] == {}
    assert clipper.last_report is not None
    names = metrics(clipper.last_report.to_dict())
    assert names["grad_near_underflow/float16"] == 0.5
    assert names["grad_zero/float16"] == names["grad_near_overflow/float16"] == 0.0

    run = read_run(path)
    counted = run.exponents["float16"]
    assert list(counted.steps) == [0, 2, 4]
    assert list(counted.underflow) == [0.0, 0.5, 0.5]
    printed = command("report", str(path)).out
    assert "gradients in float16 at step 4: 0.00% zero, 50.00% within 4 binades" in printed
    assert "nearest to underflow: small 100.00%" in printed
    assert "exponents -14 " in printed
    (drawn,) = page_data([run], summaries([run]))["runs"][0]["exponents"]
    assert (drawn["exponents"][0], drawn["counts"][0]) == (-14, 1000)
    assert drawn["underflow"] == [0.0, 50.0, 50.0]
    assert "Binary exponents of the gradients" in page.html([run], summaries([run]))


@pytest.mark.parametrize(
    "bad",
    [
        7,
        {"float7": {}},
        {"float16": {"zero": 1}},
        {"float16": {"zero": 1, "subnormal": 0, "nonfinite": 0, "lowest": 1e400, "counts": [1]}},
        {"float16": {"zero": 1, "subnormal": 0, "nonfinite": 0, "lowest": 127, "counts": [1, 2]}},
        {"float16": {"zero": -1, "subnormal": 0, "nonfinite": 0, "lowest": 1, "counts": [1]}},
        {"float16": {"zero": 1, "subnormal": 0, "nonfinite": 0, "lowest": 1, "counts": [[1]]}},
        {"float16": {"zero": 10**300, "subnormal": 0, "nonfinite": 0, "lowest": 1, "counts": []}},
    ],
)
def test_what_no_sink_wrote_is_passed_over(tmp_path: Path, bad: Any) -> None:
    good = of_row("float32", np.eye(COLUMNS)[-1]).to_dict()
    path = write(
        tmp_path / "r.jsonl",
        [record(1, exponents=bad), record(2, exponents={"float32": {**good, "nearest": 3}})],
    )
    run = read_run(path)
    assert list(run.exponents) == ["float32"]
    assert run.exponents["float32"].nearest == {}
    assert LOWEST == -126


def test_what_cannot_be_meant() -> None:
    document = {"policy": "measure", "exponents": 5, "log": {"jsonl": "x", "every": 10}}
    with pytest.raises(ConfigurationError, match=r"exponents: 5 is no multiple of log.every, 10"):
        config.load(document)
