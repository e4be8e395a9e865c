"""``value`` against the outputs of optax and torch."""

from __future__ import annotations

import numpy as np
import pytest

import distclip
from distclip import policies
from tests.policies.golden import assert_golden, clip, parameters

RTOL = 1e-6
"""Relative; the float32 codes themselves are off by up to 2.1e-7 from float64."""


@pytest.mark.parametrize("maker", ["optax.clip|0.05", "torch.clip_grad_value_|0.05"])
def test_value(golden: dict[str, np.ndarray], maker: str) -> None:
    assert_golden(clip(golden, policies.value(0.05)), golden, maker, rtol=0.0)
    have = parameters(golden)
    distclip.clip_grad_value_(have.values(), 0.05)
    assert_golden(have, golden, maker, rtol=0.0)
