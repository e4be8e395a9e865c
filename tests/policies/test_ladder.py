"""``ladder``: the order of its rungs, what refills its budgets, what it remembers."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from distclip import ConfigurationError, GradClipper, policies
from distclip.policies import Policy, Skip
from distclip.testing import check_policy, memory
from tests.policies.driving import drive

BUDGETS = ("clips", "skips", "recomputes", "rewinds")


def climb(spikes: Any, finite: Any, budgets: dict[str, int], calm: int) -> list[int]:
    """The rung of every step, by the oracle."""
    state: memory.Memory = {}
    rungs = []
    for spike, sound in zip(spikes, finite, strict=True):
        rung, state = memory.ladder(state, spike, sound, **budgets, calm=calm)
        rungs.append(rung)
    return rungs


def test_rungs_in_order_and_budgets_refilled() -> None:
    random, met = np.random.default_rng(0), set()
    for trial in range(6):
        norms = np.ones(200)
        norms[random.random(200) < 0.25] = 50.0
        norms[random.random(200) < 0.05] = math.nan
        budgets = dict(zip(BUDGETS, random.integers(0, 4, 4).tolist(), strict=True))
        calm = 1 + trial % 4
        policy = policies.ladder(policies.skip_norm(10.0, clip_norm=5.0), **budgets, calm=calm)
        actions, states = drive(policy, norms)
        spikes = ~(norms <= 10.0)
        want = climb(spikes, np.isfinite(norms), budgets, calm)
        assert [int(state["rung"]) for state in states] == want
        assert [bool(action.flag) for action in actions] == [rung > 1 for rung in want]
        met.update(want)
    assert met == {0, 1, 2, 3, 4, 5}  # or it would show little


def test_what_its_policy_remembers_is_what_that_remembers_alone() -> None:
    norms = np.concatenate((1.0 + 0.1 * np.sin(np.arange(60)), [50.0] * 5, [math.nan, 1.0, 1.1]))
    alone = policies.skip_spikes(32, 4.0, 8)
    _, plain = drive(alone, norms)
    _, states = drive(policies.ladder(alone, skips=1), norms)
    for mine, inner in zip(states, plain, strict=True):
        for key, value in inner.items():
            assert torch.equal(mine["spikes." + key], value)
    check_policy(
        lambda: policies.ladder(policies.skip_spikes(16, min_history=4), skips=2, calm=5), steps=30
    )


def test_the_clip_is_that_of_its_policy() -> None:
    parameter = torch.nn.Parameter(torch.zeros(4))
    policy = policies.ladder(policies.skip_norm(10.0, clip_norm=1.0), clips=1, skips=1)
    clipper = GradClipper([("p", parameter)], policy)
    norms = []
    for _ in range(2):
        parameter.grad = torch.full((4,), 10.0)
        report = clipper.clip_()
        norms.append((bool(report.skipped), round(parameter.grad.norm().item(), 3)))
    assert norms == [(False, 1.0), (True, 20.0)]


@pytest.mark.parametrize("mode", ["skip", "pass"])
def test_a_nan_counts(mode: Any) -> None:
    """Also where ``on_nonfinite="skip"`` drops the step, which else leaves no trace."""
    parameter = torch.nn.Parameter(torch.zeros(4))
    policy = policies.ladder(policies.skip_norm(10.0, clip_norm=1.0), clips=3, skips=3)
    clipper = GradClipper([("p", parameter)], policy, on_nonfinite=mode)
    for _ in range(2):
        parameter.grad = torch.full((4,), math.nan)
        assert bool(clipper.clip_().skipped)
    shared = clipper.state_dict()["states"][""]["shared"]  # type: ignore[index]
    assert (int(shared["clips"]), int(shared["skips"])) == (0, 2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: policies.ladder(policies.skip_norm(1.0), clips=1), "give it clip_norm"),
        (lambda: policies.ladder(policies.skip_spikes(), clips=1), "give it clip_sigma"),
        (lambda: policies.ladder(policies.skip_spikes(), skips=-1), "skips must be a whole"),
        (lambda: policies.ladder(policies.skip_spikes(), calm=0), "calm must be a whole"),
        (lambda: policies.ladder(policies.skip_spikes(), tolerance=-1.0), "tolerance must be"),
        (lambda: policies.ladder(policies.value(1.0)), "one policy that skips"),
        (lambda: policies.ladder(policies.chain(policies.skip_spikes())), "one policy that skips"),
        (lambda: policies.ladder(policies.adagc()), "remembers something of each parameter"),
    ],
)
def test_refused(make: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make()


@pytest.mark.parametrize(
    ("policy", "field"),
    [
        (policies.ladder(policies.global_norm(1.0)), "spikes"),
        (policies.ladder(policies.skip_spikes(), updates=policies.global_norm(1.0)), "updates"),
    ],
)
def test_a_ladder_on_what_never_skips_is_refused(policy: Policy, field: str) -> None:
    with pytest.raises(ConfigurationError, match=f"{field} is GlobalNorm.*, which never skips"):
        GradClipper(torch.nn.Linear(2, 2), policy)


def test_one_ladder_is_enough() -> None:
    one: Policy = policies.ladder(policies.skip_spikes())
    with pytest.raises(ConfigurationError, match="2 ladders in one policy"):
        GradClipper(torch.nn.Linear(2, 2), policies.chain(one, one))
    assert isinstance(drive(one, [1.0])[0][0], Skip)
