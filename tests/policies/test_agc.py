"""``agc`` against the outputs of timm and optax."""

from __future__ import annotations

import numpy as np
import pytest

import distclip
from distclip import policies
from tests.policies.golden import assert_golden, clip, parameters

RTOL = 1e-6
"""Relative; the float32 codes themselves are off by up to 2.1e-7 from float64."""


@pytest.mark.parametrize("clip_factor", [0.01, 0.1])
def test_timm_agc(golden: dict[str, np.ndarray], clip_factor: float) -> None:
    key = f"timm.adaptive_clip_grad|{clip_factor}"
    assert_golden(clip(golden, policies.agc(clip_factor)), golden, key)
    have = parameters(golden)
    distclip.clip_grad_agc_(have.values(), clip_factor)
    assert_golden(have, golden, key)


OPTAX_TORCH_LAYOUT = {"conv1d": (0, 1), "col": ()}
"""optax reduces axis 0 only of a rank-3 array, and squeezes a column to one whole unit."""


@pytest.mark.parametrize("clip_factor", [0.01, 0.1])
def test_optax_agc(golden: dict[str, np.ndarray], clip_factor: float) -> None:
    key = f"optax.adaptive_grad_clip_torchlayout|{clip_factor}"
    have = clip(golden, policies.agc(clip_factor))
    alike = {name: p for name, p in have.items() if name not in OPTAX_TORCH_LAYOUT}
    assert_golden(alike, golden, key)
    # On purpose: our units are output rows in any rank. (At 0.1 optax's are too large to clip.)
    for name in OPTAX_TORCH_LAYOUT if clip_factor == 0.01 else ():
        with pytest.raises(AssertionError):
            assert_golden({name: have[name]}, golden, key)
    optax_units = policies.agc(clip_factor, unit_dims=OPTAX_TORCH_LAYOUT)
    assert_golden(clip(golden, optax_units), golden, key)


@pytest.mark.parametrize("clip_factor", [0.01, 0.1])
def test_optax_agc_in_its_own_layout(golden: dict[str, np.ndarray], clip_factor: float) -> None:
    units = dict.fromkeys(("lin", "zerog", "tinyp", "emb", "conv", "conv3d"), (-1,))
    units |= {"conv1d": (1, 2), "col": ()}
    have = clip(golden, policies.agc(clip_factor, unit_dims=units))
    assert_golden(have, golden, f"optax.adaptive_grad_clip_raw|{clip_factor}")
