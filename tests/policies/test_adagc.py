"""``adagc``: the published run, defects of its peers, floor and growth."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from distclip import policies
from tests.policies.driving import GOOD, coefficients, drive


def test_adagc_with_raw_norms(published: dict[str, np.ndarray]) -> None:
    scale, gamma = published["adagc_port|paddle"]  # whose warm-up has steps 0 to 100
    actions, states = drive(policies.adagc(warmup_steps=101), published["in|tensor_norms"])
    np.testing.assert_allclose(coefficients(actions, 3), scale, rtol=3e-7)
    np.testing.assert_allclose([state["gamma"].numpy() for state in states], gamma, rtol=1e-14)


def test_row_23_adagc_does_not_collapse_nor_freeze(published: dict[str, np.ndarray]) -> None:
    norms = GOOD.copy()
    norms[20] = 1000.0
    smallest = math.inf
    for norm in norms[:100]:  # as other codes do it: norms after the global clipping
        smallest = min(smallest, norm * min(1.0, 1.0 / math.sqrt(norm**2 + 999.0**2)))
    assert 1.05 * smallest < 0.9 * GOOD.min()  # the defect: every later step is clipped
    paper = published["adagc_port|paper"][1][98], published["adagc_port|paddle"][1][98]
    assert (paper[0] < 0.5 * paper[1]).any()  # seen in the published run too
    actions, states = drive(policies.adagc(), norms)
    assert states[99]["gamma"].item() == GOOD[:100].min()
    assert (coefficients(actions)[300:] == 1).mean() > 0.3
    idle = np.stack([norms, norms], 1)
    idle[:10, 1] = 0.0  # an idle expert, or LoRA's A
    idle[200, 1] = 0.0
    actions, states = drive(policies.adagc(), idle)
    assert states[0]["gamma"][1] == 0  # not set yet
    assert states[10]["gamma"][1] == norms[10]
    assert torch.equal(states[200]["gamma"][1], states[199]["gamma"][1])
    assert (coefficients(actions, 2)[300:, 1] == 1).mean() > 0.3


def test_adagc_floor_and_growth() -> None:
    norms = np.r_[np.full(100, 1.0), np.full(2000, 1e-9), np.full(2000, 3.0)]
    _, states = drive(policies.adagc(floor=1e-3), norms)
    assert states[2099]["gamma"].item() == 1e-3
    _, states = drive(policies.adagc(), norms[2000:])
    growth = [b["gamma"].item() / a["gamma"].item() for a, b in pairwise(states[100:])]
    assert max(growth) <= 1 + 0.02 * 0.05 + 1e-12
    rising = np.r_[np.full(100, 1.0), np.full(2000, 100.0)]
    _, free = drive(policies.adagc(), rising)
    assert free[-1]["gamma"].item() == pytest.approx(1.001**2000, rel=1e-9)
    _, held = drive(policies.adagc(max_growth=3.0), rising)
    assert held[-1]["gamma"].item() == 3.0
