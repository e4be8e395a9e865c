"""Outputs of the reference codes (optax, torch, timm, DreamerV3), reproduced to their rounding.

The arrays were made in float32 by running those codes; see the keys of ``golden_clip.npz``.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from distclip import GradClipper, policies
from distclip.policies import Policy
from tests.policies.golden import assert_golden, parameters

RTOL = 1e-6
"""Relative; the float32 codes themselves are off by up to 2.1e-7 from float64."""


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
    text = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    for maker in makers:
        if not maker.startswith(left_out) and "vec3" not in maker:
            assert maker.split("|")[0] in text, maker
