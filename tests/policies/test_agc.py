"""``agc`` against the outputs of timm and optax."""

import math

import numpy as np
import pytest

import distclip
from distclip import ConfigurationError, policies
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


@pytest.mark.parametrize("clip_factor", [0.01, 0.1])
@pytest.mark.parametrize("norm_type", [1.0, 3.0, math.inf])
def test_timm_agc_of_other_orders(
    golden: dict[str, np.ndarray], norm_type: float, clip_factor: float
) -> None:
    key = f"timm.adaptive_clip_grad norm_type|{norm_type}|{clip_factor}"
    assert_golden(clip(golden, policies.agc(clip_factor, norm_type=norm_type)), golden, key)
    have = parameters(golden)
    total = distclip.clip_grad_agc_(have.values(), clip_factor, norm_type=norm_type)
    assert_golden(have, golden, key)
    gradients = [golden[f"in|g|{name}"].astype(np.float64).ravel() for name in have]
    want = np.linalg.norm(np.concatenate(gradients), norm_type)
    assert float(total) == pytest.approx(want, rel=1e-6)


def test_the_order_is_checked_and_shown() -> None:
    assert "norm_type" not in repr(policies.agc())
    assert repr(policies.agc(norm_type=1)).endswith("unit_dims=None, norm_type=1.0)")
    with pytest.raises(ConfigurationError, match="agc: norm_type must be > 0 or inf"):
        policies.agc(norm_type=0)
    with pytest.raises(ConfigurationError, match=r"unit must be .*got 2\.0"):
        distclip.clip_grad_agc_([], 0.01, 1e-3, 2.0)  # type: ignore[arg-type]  # timm's place


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
