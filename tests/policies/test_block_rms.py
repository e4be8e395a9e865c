"""``block_rms`` against the outputs of optax."""

import numpy as np
import pytest

from distclip import policies
from tests.policies.golden import assert_golden, clip

RTOL = 1e-6
"""Relative; the float32 codes themselves are off by up to 2.1e-7 from float64."""


@pytest.mark.parametrize("threshold", [0.05, 1.0])
def test_block_rms(golden: dict[str, np.ndarray], threshold: float) -> None:
    have = clip(golden, policies.block_rms(threshold))
    assert_golden(have, golden, f"optax.clip_by_block_rms|{threshold}")
