"""``zclip``: the published run, and a defect of its peers."""

import math

import numpy as np
import pytest

from distclip import policies
from tests.policies.driving import GOOD, coefficients, drive, thresholds


@pytest.mark.parametrize(("key", "max_norm"), [("default", 1.0), ("nomax", math.inf)])
def test_zclip_official(published: dict[str, np.ndarray], key: str, max_norm: float) -> None:
    want, norms = published[f"zclip_official|{key}"], published["in|norm"].astype(np.float64)
    actions, states = drive(policies.zclip(max_norm=max_norm), norms)
    # The official run clips in float32.
    np.testing.assert_allclose(norms * coefficients(actions), want[:, 0], rtol=2e-7)
    for step in range(24, len(norms)):
        assert states[step]["mean"].item() == pytest.approx(want[step, 1], rel=1e-7)
        assert states[step]["deviation"].item() ** 2 == pytest.approx(want[step, 2], rel=1e-7)


BAD = (math.nan, math.inf, -math.inf)


def test_row_21_a_nan_does_not_poison_zclip() -> None:
    def official(norms: np.ndarray) -> list[float]:
        """As the authors' code does it: whatever comes is averaged."""
        mean, var = float(np.mean(norms[:25])), float(np.var(norms[:25]))
        after = []
        for norm in norms[25:]:
            z = (norm - mean) / (math.sqrt(var) + 1e-6)
            clipped = mean + 2.5**2 / z * math.sqrt(var) if z > 2.5 else norm
            mean = 0.97 * mean + 0.03 * clipped
            var = 0.97 * var + 0.03 * (clipped - mean) ** 2
            after.append(float(clipped))
        return after

    norms = GOOD[:100].copy()
    norms[50], norms[80] = math.nan, 1e6
    assert official(norms)[55] == 1e6  # the defect: the spike passes
    for bad in BAD:
        norms[50] = bad
        actions, states = drive(policies.zclip(max_norm=None), norms)
        assert 1e6 * coefficients(actions)[80] < 1.5
        same, _ = drive(policies.zclip(max_norm=None), np.delete(norms, 50))
        assert thresholds(same)[79] == thresholds(actions)[80]
        assert all(value.isfinite().all() for state in states for value in state.values())
