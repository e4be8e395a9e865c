"""``skip_norm``: the published rule, bounds, what it is beside ``skip_spikes``."""

import math

import numpy as np
import pytest
import torch

from distclip import ConfigurationError, GradClipper, policies
from distclip.policies import ParameterInfo, Scale, Skip, Statistics
from tests.policies.driving import GOOD


def decide(policy: policies.SkipNorm, row: np.ndarray) -> tuple[bool, float]:
    """Whether it skips, and by what it scales."""
    infos = [ParameterInfo(str(i), (2,)) for i in range(len(row))]
    norms = {policy.norm_type: torch.tensor(row, dtype=torch.float64)}
    actions, state = policy.update(Statistics(infos, norms), {})
    assert state == {}
    skips = [bool(action.flag) for action in actions if isinstance(action, Skip)]
    scales = [action.coefficients.item() for action in actions if isinstance(action, Scale)]
    return skips[0], scales[0] if scales else 1.0


def test_megatrons_rule(frontier: dict[str, np.ndarray]) -> None:
    want = frontier["skip_norm|20,5"]
    assert 0 < (want == 0).sum() < 20
    assert ((want > 0) & (want < 1)).any()
    assert (want == 1).any()
    policy = policies.skip_norm(20.0, clip_norm=5.0)
    for row, expected in zip(frontier["in|norms"], want, strict=True):
        skipped, coefficient = decide(policy, row)
        assert skipped == (expected == 0.0)
        assert skipped or coefficient == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("norm", "skips"),
    [
        (0.0, False),
        (2.0, False),
        (2.0000001, True),
        (1e308, True),
        (math.inf, True),
        (math.nan, True),
    ],
)
def test_the_bound_itself_is_not_skipped(norm: float, skips: bool) -> None:
    assert decide(policies.skip_norm(2.0), np.array([norm]))[0] == skips
    unbounded = decide(policies.skip_norm(math.inf), np.array([norm]))
    assert unbounded == (not math.isfinite(norm), 1.0)


def test_a_skipped_step_changes_nothing() -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([parameter], lr=0.1, weight_decay=0.5)
    clipper = GradClipper([("p", parameter)], policies.skip_norm(10.0, clip_norm=1.0))
    clipper.attach(optimizer)
    parameter.grad = torch.tensor([3.0, 4.0])
    optimizer.step()
    assert clipper.last_report is not None
    assert clipper.last_report.clipped_norm.item() == pytest.approx(1.0)
    kept = parameter.detach().clone()
    parameter.grad = torch.tensor([30.0, 40.0])
    optimizer.step()
    assert bool(clipper.last_report.skipped)
    assert torch.equal(parameter, kept)
    assert torch.equal(parameter.grad, torch.tensor([30.0, 40.0]))
    assert optimizer.state[parameter]["step"].item() == 1


def test_impossible_bounds() -> None:
    with pytest.raises(ConfigurationError, match="max_norm must be >= 0"):
        policies.skip_norm(-1.0)
    with pytest.raises(ConfigurationError, match=r"clip_norm must be at most max_norm.* 1.0.* 2.0"):
        policies.skip_norm(1.0, clip_norm=2.0)
    with pytest.raises(ConfigurationError, match="norm_type must be > 0"):
        policies.skip_norm(1.0, 0.0)


def test_skip_spikes_clips_below_its_bound() -> None:
    """Between two deviations above the mean and six, a norm is scaled to two; above six skipped."""
    parameter = torch.nn.Parameter(torch.zeros(2))
    policy = policies.skip_spikes(64, 6.0, 32, max_consecutive=1, clip_sigma=2.0)
    clipper = GradClipper([("p", parameter)], policy)

    def clip(norm: float) -> tuple[bool, float]:
        parameter.grad = torch.tensor([norm, 0.0], dtype=torch.float32)
        report = clipper.clip_()
        return bool(report.skipped), report.clipped_norm.item()

    for norm in GOOD[:40]:
        assert clip(float(norm)) == (False, pytest.approx(norm, rel=1e-6))
    mean, deviation = GOOD[:40].mean(), GOOD[:40].std(ddof=1)
    edge = mean + 2 * deviation
    skipped, after = clip(float(mean + 4 * deviation))
    assert not skipped
    assert after == pytest.approx(edge, rel=1e-5)
    assert clip(50.0) == (True, pytest.approx(50.0))
    skipped, after = clip(50.0)  # the second in a row ends the series, and is scaled
    assert not skipped
    assert 1.0 < after < 1.5


def test_a_gate_reads_the_norm_of_its_part_and_drops_the_whole_update() -> None:
    model = torch.nn.ModuleDict({"body": torch.nn.Linear(2, 2), "lm_head": torch.nn.Linear(2, 2)})
    gate = policies.by_name({"lm_head.*": policies.skip_norm(10.0)}, policies.global_norm(1.0))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    clipper = GradClipper(model, gate)
    clipper.attach(optimizer)
    for head, body, skipped in ((1.0, 100.0, False), (100.0, 1.0, True)):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        for name, parameter in model.named_parameters():
            parameter.grad = torch.full_like(parameter, head if "head" in name else body)
        optimizer.step()
        assert clipper.last_report is not None
        assert bool(clipper.last_report.skipped) == skipped
        stands = [torch.equal(p, before[name]) for name, p in model.named_parameters()]
        assert stands == [skipped] * 4
