"""``parameter_norm`` against the outputs of optax."""

import numpy as np

from distclip import policies
from tests.policies.golden import assert_golden, clip

RTOL = 1e-6
"""Relative; the float32 codes themselves are off by up to 2.1e-7 from float64."""


def test_per_tensor_norm(golden: dict[str, np.ndarray]) -> None:
    # Without torch's 1e-6 in the denominator, which is 1e-5 of the threshold 0.1.
    have = clip(golden, policies.parameter_norm(0.1))
    assert_golden(have, golden, "optax.per_tensor_norm|0.1", rtol=1.1e-5)
