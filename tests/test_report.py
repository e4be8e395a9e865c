"""The report: its fields, its mappings, and that it says the same under every sharding."""

import copy
import html.parser
import json
import math
import pickle
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from distclip import ClipReport, GradClipper, policies
from distclip.testing import expected
from tests.engine.test_matrix import POLICIES, build
from tests.helpers.shares import share
from tests.helpers.watching import watch
from tests.sharded import shard, whole

SCALARS = [
    "total_norm",
    "clipped_norm",
    "coefficient",
    "threshold",
    "skipped",
    "clipped_fraction",
]


def model() -> list[tuple[str, Tensor]]:
    """Norms 5, 13 and no gradient."""
    gradients = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([[5.0], [12.0]]), "c": None}
    named: list[tuple[str, Tensor]] = []
    for name, gradient in gradients.items():
        shape = (2,) if gradient is None else gradient.shape
        parameter = nn.Parameter(torch.ones(shape))
        parameter.grad = gradient
        named.append((name, parameter))
    return named


TOTAL = math.hypot(5.0, 13.0)


def test_the_fields_of_a_global_clip() -> None:
    report = GradClipper(model(), policies.global_norm(1.0)).clip_()
    assert report.total_norm.item() == pytest.approx(TOTAL)
    assert report.clipped_norm.item() == pytest.approx(1.0)
    assert report.coefficient.item() == pytest.approx(1 / TOTAL)
    assert report.threshold.item() == 1.0
    assert not bool(report.skipped)
    assert report.clipped_fraction.item() == 1.0
    assert report.parameter_norms == pytest.approx({"a": 5.0, "b": 13.0, "c": 0.0})
    assert report.parameter_coefficients == pytest.approx(dict.fromkeys("abc", 1 / TOTAL))
    assert report.nonfinite == ()
    assert list(report.names) == ["a", "b", "c"]
    assert str(report) == "norm 13.93 -> 1 (coefficient 0.0718, threshold 1)"


def test_the_fields_of_a_clip_per_parameter() -> None:
    report = GradClipper(model(), policies.parameter_norm(10.0)).clip_()
    assert report.clipped_norm.item() == pytest.approx(math.hypot(5.0, 10.0))
    assert report.coefficient.item() == pytest.approx(10 / 13)
    assert report.clipped_fraction.item() == pytest.approx(1 / 3)
    assert report.parameter_coefficients == pytest.approx({"a": 1.0, "b": 10 / 13, "c": 1.0})


def test_the_fields_of_a_clip_per_unit() -> None:
    # Rows of b: norms 5 and 12, limits 0.5 * 1 * 16 = 8. The vector a is one unit: limit 11.3.
    report = GradClipper(model(), policies.agc(8.0)).clip_()
    assert report.clipped_norm.item() == pytest.approx(math.sqrt(25 + 25 + 64))
    assert report.coefficient.item() == pytest.approx(8 / 12)
    assert report.threshold.item() == 8.0
    assert report.clipped_fraction.item() == pytest.approx((0 + 1 / 2 + 0) / 3)
    # Where units differ: the norm after by the norm before.
    ratio = math.sqrt(25 + 64) / 13
    assert report.parameter_coefficients == pytest.approx({"a": 1.0, "b": ratio, "c": 1.0})


def test_the_fields_of_a_clamp() -> None:
    report = GradClipper(model(), policies.value(4.5)).clip_()
    assert report.total_norm.item() == pytest.approx(TOTAL)  # as they were
    assert report.clipped_norm.item() == pytest.approx(math.sqrt(9 + 16 + 2 * 4.5**2))
    assert report.coefficient.item() == 1.0  # nothing was scaled
    assert report.threshold.item() == 4.5
    assert report.clipped_fraction.item() == pytest.approx(1 / 3)


def test_the_fields_where_nothing_is_clipped() -> None:
    for policy in (policies.measure(), policies.global_norm(math.inf), policies.global_norm(1e3)):
        report = GradClipper(model(), policy).clip_()
        assert report.clipped_norm.item() == report.total_norm.item() == pytest.approx(TOTAL)
        assert report.coefficient.item() == 1.0
        assert report.clipped_fraction.item() == 0.0
    assert math.isnan(GradClipper(model(), policies.measure()).clip_().threshold.item())
    assert "threshold" not in str(GradClipper(model(), policies.measure()).clip_())


def test_norms_are_of_the_policys_order() -> None:
    report = GradClipper(model(), policies.global_norm(100.0, 1.0)).clip_()
    assert report.total_norm.item() == pytest.approx(24.0)
    assert report.parameter_norms == pytest.approx({"a": 7.0, "b": 17.0, "c": 0.0})
    report = GradClipper(model(), policies.measure(math.inf)).clip_()
    assert report.total_norm.item() == 12.0


@pytest.mark.parametrize("order", [0.5, 1.0, 2.0, 6.0, 12.0, math.inf])
@pytest.mark.parametrize("size", [1e-44, 1.0, 2e38])
def test_the_norm_after_clipping_at_the_ends_of_float32(size: float, order: float) -> None:
    named = [(name, nn.Parameter(torch.ones(1))) for name in "ab"]
    for _, parameter in named:
        parameter.grad = torch.full_like(parameter, size)
    report = GradClipper(named, policies.measure(order)).clip_()
    assert report.clipped_norm == report.total_norm  # inf where that is beyond float32
    assert report.total_norm > 0.0


def test_the_norm_after_a_clamp_in_the_middle_is_not_invented() -> None:
    policy = policies.chain(policies.global_norm(10.0), policies.value(1.0))
    report = GradClipper(model(), policy).clip_()
    assert math.isnan(report.clipped_norm.item())
    assert report.total_norm.item() == pytest.approx(TOTAL)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_scalars_are_plain_and_0_dim(dtype: torch.dtype) -> None:
    parameter = nn.Parameter(torch.ones(3, dtype=dtype))
    parameter.grad = torch.ones(3, dtype=dtype)
    report = GradClipper([("w", parameter)], policies.global_norm(1.0)).clip_()
    want = torch.float64 if dtype is torch.float64 else torch.float32
    for name in SCALARS:
        value = getattr(report, name)
        assert type(value) is Tensor
        assert value.shape == ()
        assert value.dtype is (torch.bool if name == "skipped" else want), name
        assert not value.requires_grad


def test_to_dict_is_json() -> None:
    report = GradClipper(model(), policies.global_norm(1.0)).clip_()
    shown = report.to_dict()
    assert json.loads(json.dumps(shown)) == shown
    assert set(shown) == {*SCALARS, "nonfinite", "parameters"}
    assert shown["total_norm"] == report.total_norm.item()
    assert shown["skipped"] is False
    assert shown["parameters"]["b"] == {
        "norm": report.parameter_norms["b"],
        "coefficient": report.parameter_coefficients["b"],
    }
    assert "parameters" not in report.to_dict(per_parameter=False)


def test_a_skipped_report() -> None:
    named = model()
    assert named[0][1].grad is not None
    named[0][1].grad[0] = math.nan
    report = GradClipper(named, policies.global_norm(1.0), on_nonfinite="skip").clip_()
    assert report.to_dict()["skipped"] is True
    assert report.nonfinite == ("a",)
    assert set(report.parameter_coefficients.values()) == {1.0}
    assert str(report) == "norm nan, skipped"


def test_without_norms_the_report_has_what_the_policy_needed_anyway() -> None:
    report = GradClipper(model(), policies.global_norm(1.0), norms=False).clip_()
    assert report.total_norm.item() == pytest.approx(TOTAL)
    assert report.coefficient.item() == pytest.approx(1 / TOTAL)
    named = model()
    silent = GradClipper(named, policies.value(4.5), norms=False, on_nonfinite="pass")
    report = silent.clip_()
    assert math.isnan(report.total_norm.item())
    assert report.nonfinite == ()
    assert named[1][1].grad is not None
    assert named[1][1].grad.flatten().tolist() == [4.5, 4.5]


def test_a_report_stays_what_it_was() -> None:
    named = model()
    clipper = GradClipper(named, policies.global_norm(1.0))
    first = clipper.clip_()
    shown = dict(first.to_dict())
    for _, parameter in named:
        parameter.grad = None
    clipper.clip_()
    assert ClipReport.to_dict(first) == shown


@pytest.mark.parametrize("label", list(POLICIES))
def test_a_report_may_be_read_late_copied_and_pickled(label: str) -> None:
    """What is read is computed from the books, which later steps must not write into."""
    reports: dict[bool, list[ClipReport]] = {False: [], True: []}
    for read, kept in reports.items():
        model_ = shard("plain", whole())
        clipper = GradClipper(model_.named(), build(POLICIES[label]))
        for scale in (1.0, 3.0):
            model_.set_gradients(whole(scale=scale).gradients)
            kept.append(clipper.clip_())
            if read:
                kept[-1].to_dict()
    for late, early in zip(reports[False], reports[True], strict=True):
        copied = pickle.loads(pickle.dumps(late))
        assert "_program" not in repr(copied.__dict__)
        assert json.dumps(late.to_dict()) == json.dumps(early.to_dict())
        assert json.dumps(copied.to_dict()) == json.dumps(early.to_dict())
        assert json.dumps(copy.deepcopy(early).to_dict()) == json.dumps(early.to_dict())


def test_sinks_get_every_step() -> None:
    seen: list[tuple[int, ClipReport]] = []
    clipper = GradClipper(
        model(), policies.measure(), sinks=[lambda step, report: seen.append((step, report))]
    )
    reports = [clipper.clip_() for _ in range(3)]
    assert [step for step, _ in seen] == [0, 1, 2]
    assert all(one is other for (_, one), other in zip(seen, reports, strict=True))


LAYOUTS = ["fsdp2", "hsdp", "tp", "fsdp2_tp", "mixed"]
LOWER_BOUND = "chain agc twice"
"""Units of two kinds for one parameter: no coefficient is tracked element by element."""


@pytest.mark.ranks(2, 3, 4)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_report_says_the_same_under_every_sharding(layout: str, world_size: int) -> None:
    """Each policy under each layout on one number of ranks."""
    some = share(POLICIES, LAYOUTS.index(layout), world_size, of=3)
    same_reports(some, layout, norms=True)


@pytest.mark.ranks(3)
def test_without_norms_it_does_too() -> None:
    for layout in ("fsdp2", "mixed"):
        same_reports(POLICIES, layout, norms=False)


def same_reports(some: dict[str, Any], layout: str, *, norms: bool) -> None:
    values = whole(seed=2)
    sharded, alone = shard(layout, values), shard("plain", values)
    options: dict[str, Any] = {"norms": norms, "on_nonfinite": "skip"}
    for label, configuration in some.items():
        reports = []
        for model in (sharded, alone):
            model.set_gradients(values.gradients)
            reports.append(GradClipper(model.named(), build(configuration), **options).clip_())
        have, want = (report.to_dict() for report in reports)
        parameters = have.pop("parameters"), want.pop("parameters")
        for key in SCALARS:
            if key == "coefficient" and label == LOWER_BOUND:
                continue
            expect = pytest.approx(want[key], rel=2e-6, nan_ok=True)
            assert have[key] == expect, (label, key)
        for name, shown in parameters[1].items():
            for key, value in shown.items():
                expect = pytest.approx(value, rel=2e-6, nan_ok=True)
                assert parameters[0][name][key] == expect, (label, name, key)


@pytest.mark.ranks(1, 3)
def test_parameter_coefficients_are_the_ratio_of_norms() -> None:
    values = whole(seed=4)
    layout = "plain" if dist.get_world_size() == 1 else "fsdp2"
    for label in ("global", "parameter", "block rms", "agc", "chain agc, global", "chain scales"):
        model = shard(layout, values)
        model.set_gradients(values.gradients)
        want = expected(POLICIES[label], values.gradients, values.weights)
        report = GradClipper(model.named(), build(POLICIES[label])).clip_()
        for name, gradient in want.gradients.items():
            before = want.parameter_norms[name]
            if gradient is None or before == 0.0:
                continue
            ratio = float((gradient**2).sum() ** 0.5) / before
            assert report.parameter_coefficients[name] == pytest.approx(ratio, rel=2e-6)


def test_the_last_report_and_one_sink() -> None:
    parameter = nn.Parameter(torch.ones(3))
    seen: list[tuple[int, ClipReport]] = []
    clipper = GradClipper(
        [parameter],
        policies.global_norm(1.0),
        sinks=lambda step, report: seen.append((step, report)),
    )
    assert clipper.last_report is None
    parameter.grad = torch.ones(3)
    first = clipper.clip_()
    assert clipper.last_report is first is seen[0][1]
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    handle = clipper.attach(optimizer)
    assert handle.last_report is None
    parameter.grad = torch.full((3,), 2.0)
    optimizer.step()
    assert handle.last_report is clipper.last_report is seen[1][1]
    assert [step for step, _ in seen] == [0, 1]
    assert handle.last_report.total_norm.item() == pytest.approx(12**0.5)
    handle.remove()


class Shown(html.parser.HTMLParser):
    """Tags with their attributes, and the text, of what a notebook shows."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[tuple[str, str | None]] = set()
        self.cells: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes.update(attrs)

    def handle_data(self, data: str) -> None:
        self.cells.append(data)


def test_a_notebook_shows_a_report_and_a_clipper() -> None:
    hostile = "<script>alert(1)</script>&\x1b[2J"
    named = [*model(), (hostile, nn.Parameter(torch.ones(1)))]
    named[-1][1].grad = torch.tensor([math.nan])
    clipper = GradClipper(named, policies.agc(0.01), on_nonfinite="skip")
    before = Shown(clipper._repr_html_())
    assert "agc" in before.cells[2].lower()
    report = clipper.clip_()
    for shown in (Shown(report._repr_html_()), Shown(clipper._repr_html_())):
        assert shown.tags <= {"table", "caption", "tr", "th", "td", "details", "summary"}
        assert shown.attributes <= {
            ("scope", "row"), ("scope", "col"), ("style", "text-align: left")
        }  # fmt: skip
        assert shown.cells.count("<script>alert(1)</script>&\\x1b[2J") == 2  # bad, and in the list
        assert "skipped" in shown.cells
        assert shown.cells[-9:-6] == ["b", "13", "1"]  # after NaN, the largest
    assert "Largest norms, 4 of 4 parameters" in Shown(clipper._repr_html_()).cells


def test_what_a_notebook_shows_waits_for_the_device_once(monkeypatch: pytest.MonkeyPatch) -> None:
    report = GradClipper(model(), policies.global_norm(1.0)).clip_()
    fetched = report.fetch()
    monkeypatch.setattr(ClipReport, "fetch", lambda self, **options: fetched)
    for name in ("total_norm", "skipped", "coefficient"):
        monkeypatch.setattr(type(getattr(report, name)), "item", lambda tensor: pytest.fail("read"))
    assert "13.93" in report._repr_html_()


@pytest.mark.parametrize("policy", [policies.global_norm(1.0), policies.measure()])
def test_its_tensors_are_the_scalars_of_its_dict_and_wait_for_nothing(policy: Any) -> None:
    report = GradClipper(model(), policy).clip_()
    with watch() as seen:
        found = report.tensors()
    assert not [op for op in seen.ops if "_local_scalar_dense" in op]
    want = report.to_dict(per_parameter=False)
    want["nonfinite"] = len(want["nonfinite"])
    if isinstance(policy, policies.Measure):
        assert math.isnan(want.pop("threshold"))
    assert {name: value.item() for name, value in found.items()} == pytest.approx(want)
    assert copy.deepcopy(report).tensors().keys() == found.keys()
