"""``autoclip``: the formula, over the whole history and over a window."""

import numpy as np
import pytest

from distclip import policies
from tests.policies.driving import coefficients, drive, thresholds


@pytest.mark.parametrize("percentile", [10, 50, 90])
def test_autoclip_formula(published: dict[str, np.ndarray], percentile: int) -> None:
    want, norms = (
        published[f"autoclip_formula|p={percentile}"],
        published["in|norm"].astype(np.float64),
    )
    exact, _ = drive(policies.autoclip(percentile, window=200), norms)
    np.testing.assert_allclose(thresholds(exact), want[:, 0], rtol=1e-14)
    np.testing.assert_allclose(norms * coefficients(exact), want[:, 1], rtol=1e-14)
    counted, _ = drive(policies.autoclip(percentile), norms)
    error = np.abs(thresholds(counted) / want[:, 0] - 1).max()
    assert 0 < error <= policies.AutoClip.relative_error


def test_windowed_percentile(published: dict[str, np.ndarray]) -> None:
    actions, _ = drive(policies.autoclip(95, window=100), published["in|norm"])
    want = published["windowed_percentile_formula|p=95,w=100"]
    np.testing.assert_allclose(thresholds(actions), want, rtol=1e-14)
