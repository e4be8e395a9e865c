"""Outputs of the reference codes (optax, torch, timm, DreamerV3), reproduced to their rounding.

The arrays were made in float32 by running those codes; see the keys of ``golden_clip.npz``.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import distclip
from distclip import GradClipper, policies
from distclip.policies import Policy

GOLDEN = Path(__file__).parent.parent / "golden" / "golden_clip.npz"
TENSORS = [
    "lin",
    "vec",
    "conv",
    "scal",
    "zerop",
    "zerog",
    "tinyp",
    "emb",
    "conv1d",
    "col",
    "conv3d",
]
RTOL = 1e-6
"""Relative; the float32 codes themselves are off by up to 2.1e-7 from float64."""


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN, allow_pickle=False) as file:
        return dict(file)


def parameters(golden: dict[str, np.ndarray], names: list[str] = TENSORS) -> dict[str, Tensor]:
    result: dict[str, Tensor] = {}
    for name in names:
        result[name] = nn.Parameter(torch.from_numpy(golden[f"in|p|{name}"].copy()))
        result[name].grad = torch.from_numpy(golden[f"in|g|{name}"].copy())
    return result


def assert_golden(
    have: dict[str, Tensor], golden: dict[str, np.ndarray], key: str, *, rtol: float = RTOL
) -> None:
    for name, parameter in have.items():
        want = torch.from_numpy(golden[f"{key}|{name}"])
        assert parameter.grad is not None
        torch.testing.assert_close(
            parameter.grad,
            want.reshape(parameter.shape),
            rtol=rtol,
            atol=0.0,
            equal_nan=True,
            msg=lambda text, name=name: f"{key}|{name}: {text}",
        )


def clip(golden: dict[str, np.ndarray], policy: Policy) -> dict[str, Tensor]:
    have = parameters(golden)
    GradClipper(have.items(), policy, on_nonfinite="pass").clip_()
    return have


@pytest.mark.parametrize("maker", ["optax.clip|0.05", "torch.clip_grad_value_|0.05"])
def test_value(golden: dict[str, np.ndarray], maker: str) -> None:
    assert_golden(clip(golden, policies.value(0.05)), golden, maker, rtol=0.0)
    have = parameters(golden)
    distclip.clip_grad_value_(have.values(), 0.05)
    assert_golden(have, golden, maker, rtol=0.0)


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


def test_per_tensor_norm(golden: dict[str, np.ndarray]) -> None:
    # Without torch's 1e-6 in the denominator, which is 1e-5 of the threshold 0.1.
    have = clip(golden, policies.parameter_norm(0.1))
    assert_golden(have, golden, "optax.per_tensor_norm|0.1", rtol=1.1e-5)


@pytest.mark.parametrize("threshold", [0.05, 1.0])
def test_block_rms(golden: dict[str, np.ndarray], threshold: float) -> None:
    have = clip(golden, policies.block_rms(threshold))
    assert_golden(have, golden, f"optax.clip_by_block_rms|{threshold}")


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


@pytest.mark.parametrize("maker", ["dreamerv3.clip_by_agc", "formula.clip_by_agc"])
@pytest.mark.parametrize("limit", [0.3, 0.01])
def test_dreamer_agc(golden: dict[str, np.ndarray], maker: str, limit: float) -> None:
    have = clip(golden, policies.dreamer_agc(limit, pmin=1e-3))
    assert_golden(have, golden, f"{maker}|clip={limit},pmin=0.001")


@pytest.mark.parametrize("bad", ["nan", "inf"])
@pytest.mark.parametrize(
    ("maker", "policy"),
    [
        ("optax.clip_by_global_norm|1.0", policies.global_norm(1.0)),
        ("torch.clip_grad_norm_|p=2.0,max=1.0", policies.global_norm(1.0)),
        ("torch.clip_grad_value_|0.05", policies.value(0.05)),
        ("timm.adaptive_clip_grad|0.01", policies.agc(0.01)),
        ("dreamerv3.clip_by_agc|clip=0.3,pmin=0.001", policies.dreamer_agc(0.3)),
    ],
    ids=["optax", "torch", "value", "timm", "dreamer"],
)
def test_pass_hands_nonfinite_on_as_the_reference(
    golden: dict[str, np.ndarray], maker: str, policy: Policy, bad: str
) -> None:
    have = parameters(golden, ["lin", "vec"])
    assert have["vec"].grad is not None
    have["vec"].grad[3] = float(bad)
    GradClipper(have.items(), policy, on_nonfinite="pass").clip_()
    assert_golden(have, golden, f"{maker},vec3={bad}")


def test_zero_drops_the_whole_gradient_where_optax_drops_elements(
    golden: dict[str, np.ndarray],
) -> None:
    have = parameters(golden, ["lin", "vec"])
    for name, parameter in have.items():
        parameter.grad = torch.from_numpy(golden[f"in|g_nonfinite|{name}"].copy())
    bad = {name for name, p in have.items() if p.grad is not None and not p.grad.isfinite().all()}
    GradClipper(have.items(), policies.measure(), on_nonfinite="zero").clip_()
    assert bad
    for name, parameter in have.items():
        assert parameter.grad is not None
        want = torch.from_numpy(golden[f"optax.zero_nans|{name}"])
        if name in bad:
            assert (parameter.grad == 0).all()
        else:
            assert torch.equal(parameter.grad, want)


def test_every_golden_of_a_policy_is_used(golden: dict[str, np.ndarray]) -> None:
    makers = {key.rsplit("|", 1)[0] for key in golden if not key.startswith(("in|", "meta|"))}
    left_out = ("ref64.", "optax.normalize_by_update_norm", "optax.per_example", "optax.zero_nans")
    text = Path(__file__).read_text()
    for maker in makers:
        if not maker.startswith(left_out) and "vec3" not in maker:
            assert maker.split("|")[0] in text, maker
