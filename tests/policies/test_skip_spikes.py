"""``skip_spikes``: the published run, and series of skips."""

import math
from collections.abc import Sequence

import numpy as np
import torch

from distclip import policies
from distclip.policies import Skip
from tests.policies.driving import GOOD, drive


def skipped(actions: Sequence[Skip]) -> list[int]:
    return [step for step, action in enumerate(actions) if bool(action.flag)]


def test_olmo_skip_step(published: dict[str, np.ndarray]) -> None:
    norms, losses = published["in|norm"], published["in|loss"]
    actions, _ = drive(policies.skip_spikes(32, 3.0, 15, loss=True), norms, losses)
    assert (
        skipped(actions) == np.flatnonzero(published["olmo_skip_step_official|32x3"] == 0).tolist()
    )
    # At 91 there is a second spike in a row. OLMo lets it through, having just put the first one
    # into its window; here it is skipped: spikes do not enter.
    official = np.flatnonzero(published["olmo_skip_step_official|128x6"] == 0).tolist()
    actions, _ = drive(policies.skip_spikes(128, 6.0, 63, loss=True), norms, losses)
    assert official == [90, 120, 180]
    assert skipped(actions) == [90, 91, 120, 180]


def test_row_22_a_nan_does_not_make_every_step_skip(published: dict[str, np.ndarray]) -> None:
    official = published["olmo_skip_step_official|16x6_nan_at_60"]
    assert (official[60:77] == 0).all()  # the defect: the whole window after the NaN
    norms = published["in|norm"].astype(np.float64).copy()
    norms[60] = math.nan
    actions, _ = drive(policies.skip_spikes(16, 6.0, 8), norms)
    assert [step for step in skipped(actions) if 60 <= step < 77] == [60]
    # Nor does it make the window deaf: spikes after it are skipped as without the NaN.
    norms[70] = 1e3 * norms[69]
    spiky = skipped(drive(policies.skip_spikes(16, 6.0, 8), norms)[0])
    without = skipped(drive(policies.skip_spikes(16, 6.0, 8), np.delete(norms, 60))[0])
    assert 70 in spiky
    assert [step - (step > 60) for step in spiky if step != 60] == without


def test_a_series_of_skips_ends() -> None:
    norms = np.r_[GOOD[:100], 50.0 + GOOD[:200]]
    actions, states = drive(policies.skip_spikes(max_consecutive=7), norms)
    assert skipped(actions) == list(range(100, 107))
    assert states[107]["seen"].item() == 1  # the window begins with the new normal
    norms[290] = 200.0
    assert 290 in skipped(drive(policies.skip_spikes(max_consecutive=7), norms)[0])
    # A NaN is no member of a series, and never let through.
    broken = np.r_[GOOD[:100], np.full(50, math.nan), GOOD[:10]]
    actions, states = drive(policies.skip_spikes(max_consecutive=7), broken)
    assert skipped(actions) == list(range(100, 150))
    assert all(torch.equal(states[99][key], states[149][key]) for key in states[99])
