"""``dreamer_agc`` against the outputs of DreamerV3."""

import numpy as np
import pytest

from distclip import policies
from tests.policies.golden import assert_golden, clip

RTOL = 1e-6
"""Relative; the float32 codes themselves are off by up to 2.1e-7 from float64."""


@pytest.mark.parametrize("maker", ["dreamerv3.clip_by_agc", "formula.clip_by_agc"])
@pytest.mark.parametrize("limit", [0.3, 0.01])
def test_dreamer_agc(golden: dict[str, np.ndarray], maker: str, limit: float) -> None:
    have = clip(golden, policies.dreamer_agc(limit, pmin=1e-3))
    assert_golden(have, golden, f"{maker}|clip={limit},pmin=0.001")
