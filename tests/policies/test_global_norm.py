"""``global_norm`` against the outputs of optax and torch."""

import math

import numpy as np
import pytest

import distclip
from distclip import GradClipper, policies
from tests.policies.golden import assert_golden, clip, parameters

RTOL = 1e-6
"""Relative; the float32 codes themselves are off by up to 2.1e-7 from float64."""


@pytest.mark.parametrize("max_norm", [1.0, 10000.0])
def test_optax_global_norm(golden: dict[str, np.ndarray], max_norm: float) -> None:
    have = clip(golden, policies.global_norm(max_norm))
    assert_golden(have, golden, f"optax.clip_by_global_norm|{max_norm}")


@pytest.mark.parametrize("norm_type", [0.5, 1.0, 2.0, 3.0, math.inf])
def test_torch_norm(golden: dict[str, np.ndarray], norm_type: float) -> None:
    key = f"torch.clip_grad_norm_|p={norm_type},max=1.0"
    want = golden[f"{key}|__total_norm__"].item()
    have = parameters(golden)
    report = GradClipper(have.items(), policies.global_norm(1.0, norm_type)).clip_()
    assert_golden(have, golden, key)
    assert report.total_norm.item() == pytest.approx(want, rel=RTOL)
    have = parameters(golden)
    norm = distclip.clip_grad_norm_(have.values(), 1.0, norm_type)
    assert_golden(have, golden, key)
    assert norm.item() == pytest.approx(want, rel=RTOL)
