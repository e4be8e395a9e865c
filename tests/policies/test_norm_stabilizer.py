"""``norm_stabilizer``: the published norms, coefficients above 1, what a spike does."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from distclip import ConfigurationError, GradClipper, policies
from tests.policies.driving import coefficients, drive


@pytest.mark.parametrize("gammas", [(0.7, 0.9), (0.85, 0.99999)])
def test_the_published_norms(frontier: dict[str, np.ndarray], gammas: tuple[float, float]) -> None:
    tables = {
        (0.7, 0.9): frontier["norm_stabilizer|default"],
        (0.85, 0.99999): frontier["norm_stabilizer|0.85,0.99999"],
    }
    norms, want = frontier["in|norms"], tables[gammas]
    assert policies.norm_stabilizer() == policies.norm_stabilizer(0.7, 0.9, 1e-8)
    actions, _ = drive(policies.norm_stabilizer(*gammas), norms)
    factors = coefficients(actions, norms.shape[1])
    np.testing.assert_allclose(factors * norms, want, rtol=1e-9)
    assert (factors > 1).any()
    assert (factors < 1).any()


def test_a_spike_is_no_larger_than_other_steps_and_leaves_a_finite_state() -> None:
    norms = np.full(60, 2.0)
    norms[30], norms[40], norms[41], norms[42] = 1e12, math.nan, math.inf, 0.0
    actions, states = drive(policies.norm_stabilizer(), norms)
    with np.errstate(invalid="ignore"):
        after = coefficients(actions) * norms
    assert after[:30] == pytest.approx(1.0)
    assert 0.9 < after[30] < 1.0
    assert np.nanmax(after[43:]) < 1.01
    assert all(value.isfinite().all() for state in states for value in state.values())
    same, _ = drive(policies.norm_stabilizer(), np.delete(norms, [40, 41, 42]))
    np.testing.assert_array_equal(coefficients(same)[40:], coefficients(actions)[43:])


@pytest.mark.parametrize("fused", [False, True])
def test_raised_gradients_in_report_and_step(fused: bool) -> None:
    """A report, replicas and a fused step take coefficients above 1."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, fused=fused)
    clipper = GradClipper(model, policies.norm_stabilizer(), verify_replicas=1)
    clipper.attach(optimizer)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    optimizer.step()
    report = clipper.last_report
    assert report is not None
    for name, parameter in model.named_parameters():
        assert (before[name] - parameter).norm().item() == pytest.approx(1.0, rel=1e-4)
        assert report.parameter_coefficients[name] > 100
    assert report.coefficient.item() > 100
    assert report.clipped_norm.item() == pytest.approx(math.sqrt(2.0), rel=1e-4)
    assert report.clipped_fraction.item() == 0.0
    one = policies.chain(policies.norm_stabilizer())
    same = nn.Parameter(torch.ones(4))
    single = GradClipper([("p", same)], one)
    handle = single.attach(torch.optim.SGD([same], lr=1.0, fused=fused))
    same.grad = torch.full((4,), 1e-3)
    optimizer = torch.optim.SGD([same], lr=1.0, fused=fused)
    handle.remove()
    single.attach(optimizer)
    optimizer.step()
    assert (1.0 - same).norm().item() == pytest.approx(1.0, rel=1e-4)


def test_impossible_arguments() -> None:
    for arguments, message in (((1.0,), "gamma1 must be >= 0 and < 1"), ((0.5, 0.5, 0.0), "eps")):
        with pytest.raises(ConfigurationError, match=message):
            policies.norm_stabilizer(*arguments)
