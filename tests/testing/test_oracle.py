"""The oracle against what the reference implementations computed, and against sums done by hand."""

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from distclip.testing import expected
from distclip.testing.norms import norm

GOLDEN = dict(np.load(Path(__file__).parents[1] / "golden" / "golden_clip.npz").items())
# float32 references of a few hundred elements; the README of the golden file found 2.1e-7.
FLOAT32 = {"rtol": 2e-6, "atol": 1e-9}
FLOAT64 = {"rtol": 1e-13, "atol": 0.0}


def golden(prefix):
    start = prefix + "|"
    return {key.removeprefix(start): GOLDEN[key] for key in GOLDEN if key.startswith(start)}


GRADIENTS, WEIGHTS = golden("in|g"), golden("in|p")


def check(prefix, policy, only=None, **kwargs):
    want = golden(prefix)
    assert want
    result = expected(policy, GRADIENTS, WEIGHTS, **kwargs)
    tolerance = FLOAT64 if prefix.startswith("ref64") else FLOAT32
    if "__total_norm__" in want:
        np.testing.assert_allclose(result.total_norm, want.pop("__total_norm__"), **tolerance)
    assert set(want) == set(GRADIENTS)
    for name in only or want:
        np.testing.assert_allclose(
            result.gradients[name], want[name], err_msg=f"{prefix} {name}", **tolerance
        )
    return result


@pytest.mark.parametrize("maker", ["ref64.clip", "torch.clip_grad_value_", "optax.clip"])
def test_value(maker):
    check(f"{maker}|0.05", {"name": "value", "clip_value": 0.05})


@pytest.mark.parametrize("maker", ["ref64.clip_grad_norm_", "torch.clip_grad_norm_"])
@pytest.mark.parametrize("norm_type", [0.5, 1.0, 2.0, 3.0, float("inf")])
def test_global_norm(maker, norm_type):
    policy = {"name": "global_norm", "max_norm": 1.0, "norm_type": norm_type}
    check(f"{maker}|p={norm_type},max=1.0", policy)


@pytest.mark.parametrize("max_norm", [1.0, 10000.0])
def test_global_norm_of_optax_which_has_no_epsilon(max_norm):
    check(f"optax.clip_by_global_norm|{max_norm}", {"name": "global_norm", "max_norm": max_norm})


def test_parameter_norm_of_optax_which_has_no_epsilon():
    want = golden("optax.per_tensor_norm|0.1")
    result = expected({"name": "parameter_norm", "max_norm": 0.1}, GRADIENTS, WEIGHTS)
    for name, gradient in result.gradients.items():
        # The epsilon of torch, 1e-6 in a norm above 0.1, is all that differs.
        np.testing.assert_allclose(gradient, want[name], rtol=1.1e-5, atol=1e-9)


@pytest.mark.parametrize("maker", ["ref64.clip_by_block_rms", "optax.clip_by_block_rms"])
@pytest.mark.parametrize("threshold", [0.05, 1.0])
def test_block_rms(maker, threshold):
    check(f"{maker}|{threshold}", {"name": "block_rms", "threshold": threshold})


@pytest.mark.parametrize("maker", ["ref64.agc_torchunits", "timm.adaptive_clip_grad"])
@pytest.mark.parametrize("clip_factor", [0.01, 0.1])
def test_agc(maker, clip_factor):
    check(f"{maker}|{clip_factor}", {"name": "agc", "clip_factor": clip_factor})


@pytest.mark.parametrize("clip_factor", [0.01, 0.1])
def test_agc_of_optax_but_for_its_own_units(clip_factor):
    prefix = f"optax.adaptive_grad_clip_torchlayout|{clip_factor}"
    policy = {"name": "agc", "clip_factor": clip_factor}
    same = set(GRADIENTS) - {"conv1d", "col"}
    check(prefix, policy, only=same)
    # optax takes a column for one vector, and reduces only one dim of three.
    as_optax = policy | {"unit_dims": {"col": [], "conv1d": [0, 1]}}
    result = expected(as_optax, GRADIENTS, WEIGHTS)
    want = golden(prefix)
    for name in ("col", "conv1d"):
        np.testing.assert_allclose(result.gradients[name], want[name], **FLOAT32)
    if clip_factor == 0.01:  # at 0.1 neither way clips them
        ours = expected(policy, GRADIENTS, WEIGHTS).gradients
        assert not np.allclose(ours["conv1d"], want["conv1d"], rtol=1e-3)
        assert not np.allclose(ours["col"], want["col"], rtol=1e-3)


@pytest.mark.parametrize(
    "maker", ["ref64.clip_by_agc", "dreamerv3.clip_by_agc", "formula.clip_by_agc"]
)
@pytest.mark.parametrize("clip", [0.3, 0.01])
def test_dreamer_agc(maker, clip):
    check(f"{maker}|clip={clip},pmin=0.001", {"name": "dreamer_agc", "clip": clip})


@pytest.mark.parametrize("value", ["nan", "inf"])
@pytest.mark.parametrize(
    ("maker", "policy"),
    [
        ("torch.clip_grad_norm_|p=2.0,max=1.0", {"name": "global_norm", "max_norm": 1.0}),
        ("torch.clip_grad_value_|0.05", {"name": "value", "clip_value": 0.05}),
        ("timm.adaptive_clip_grad|0.01", {"name": "agc"}),
        ("dreamerv3.clip_by_agc|clip=0.3,pmin=0.001", {"name": "dreamer_agc"}),
    ],
)
def test_non_finite_passes_as_in_the_references(maker, policy, value):
    want = golden(f"{maker},vec3={value}")
    gradients = {name: GRADIENTS[name].copy() for name in want}
    gradients["vec"][3] = float(value)
    result = expected(policy, gradients, WEIGHTS)
    assert result.nonfinite == ("vec",)
    for name in want:
        np.testing.assert_allclose(result.gradients[name], want[name], **FLOAT32)


# ---- by hand ----

G = {"a.weight": [[3.0, 0.0], [0.0, 4.0]], "a.bias": [12.0], "b": None}
W = {"a.weight": [[1.0, 0.0], [0.0, 0.0]], "a.bias": [2.0], "b": [1.0]}
EPS = 1e-6


def test_measuring_changes_nothing():
    result = expected({"name": "measure"}, G, W)
    assert (result.total_norm, result.clipped_norm, result.coefficient) == (13.0, 13.0, 1.0)
    assert result.parameter_norms == {"a.weight": 5.0, "a.bias": 12.0, "b": 0.0}
    assert result.gradients["b"] is None
    assert not result.skipped


def test_units_are_rows_and_stacked_experts_may_say_otherwise():
    policy = {"name": "agc", "clip_factor": 0.5, "eps": 0.1}
    result = expected(policy, G, W)
    np.testing.assert_allclose(result.gradients["a.weight"], [[0.5, 0.0], [0.0, 0.05]])
    np.testing.assert_allclose(result.coefficients["a.weight"], [[0.5 / 3], [0.05 / 4]])
    np.testing.assert_allclose(result.gradients["a.bias"], [1.0])
    assert result.coefficients["a.bias"].shape == ()
    assert result.coefficient == pytest.approx(0.05 / 4)

    whole = expected(policy | {"unit": "tensor"}, G, W)
    np.testing.assert_allclose(whole.coefficients["a.weight"], 0.5 / 5)

    gradients, weights = {"experts": np.ones((2, 3, 4))}, {"experts": np.zeros((2, 3, 4))}
    gradients["experts"][1, 2] *= 10
    stacked = expected(policy | {"unit_dims": {"exp*": [0, 1]}}, gradients, weights)
    assert stacked.coefficients["experts"].shape == (2, 3, 1)
    np.testing.assert_allclose(stacked.coefficients["experts"][0], 0.05 / 2)
    np.testing.assert_allclose(stacked.coefficients["experts"][1, 2], 0.05 / 20)


def test_the_floors_of_agc():
    zero = {"w": [0.0, 0.0]}
    policy = {"name": "agc", "clip_factor": 1e-4, "eps": 1e-3}
    # Above the limit of 1e-7, but the divisor is not less than 1e-6.
    assert expected(policy, {"w": [3e-7, 4e-7]}, zero).coefficient == pytest.approx(0.1)
    assert expected(policy, {"w": [3e-8, 4e-8]}, zero).coefficient == 1.0
    dreamer = {"name": "dreamer_agc", "clip": 0.5, "pmin": 1e-2}
    assert expected(dreamer, {"w": [0.3, 0.4]}, zero).coefficient == pytest.approx(0.01)


def test_a_chain_hands_on_what_it_made():
    chain = [{"name": "value", "clip_value": 4.0}, {"name": "global_norm", "max_norm": 1.0}]
    result = expected(chain, G, W)
    clamped = np.sqrt(9 + 16 + 16)
    np.testing.assert_allclose(result.gradients["a.bias"], [4 / (clamped + EPS)])
    assert result.total_norm == 13.0
    assert result.clipped_norm == pytest.approx(1.0, rel=1e-6)
    backwards = expected(chain[::-1], G, W)
    np.testing.assert_allclose(backwards.gradients["a.bias"], [12 / (13 + EPS)])


def test_the_first_matching_name_decides_and_none_leaves_alone():
    policy = {
        "by_name": {"*.bias": None, "a.*": [{"name": "value", "clip_value": 1.0}], "*": None},
        "default": {"name": "value", "clip_value": 0.0},
    }
    result = expected(policy, G, W)
    np.testing.assert_allclose(result.gradients["a.bias"], [12.0])
    np.testing.assert_allclose(result.gradients["a.weight"], np.eye(2))
    # A norm under by_name is the norm of what the pattern has chosen.
    chosen = {"by_name": {"*.bias": None}, "default": {"name": "global_norm", "max_norm": 1.0}}
    np.testing.assert_allclose(expected(chosen, G, W).coefficients["a.weight"], 1 / (5 + EPS))


def test_groups_have_a_norm_each():
    policy = {"name": "group_norm", "max_norm": 6.0}
    result = expected(policy, G, W, groups={"a.weight": 0, "a.bias": 1, "b": 1})
    np.testing.assert_allclose(result.coefficients["a.weight"], 1.0)
    np.testing.assert_allclose(result.coefficients["a.bias"], 6 / (12 + EPS))
    with pytest.raises(ValueError, match="needs groups"):
        expected(policy, G, W)


def test_the_reported_norm_is_of_the_first_policy_that_reads_norms():
    policy = [{"name": "agc"}, {"name": "parameter_norm", "max_norm": 1.0, "norm_type": 1}]
    assert expected(policy, G, W).total_norm == 13.0
    assert expected([{"name": "value", "clip_value": 99.0}, *policy[1:]], G, W).total_norm == 19.0
    nested = {"by_name": {"x": None}, "default": policy[1]}
    assert expected(nested, G, W).parameter_norms["a.weight"] == 7.0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_modes(bad):
    gradients = G | {"c": [1.0, bad]}
    weights = W | {"c": [1.0, 1.0]}
    policy = {"name": "global_norm", "max_norm": 1.0}
    zeroed = expected(policy, gradients, weights, on_nonfinite="zero")
    assert zeroed.total_norm == 13.0
    assert zeroed.gradients["c"].tolist() == [0.0, 0.0]
    assert zeroed.nonfinite == ("c",)
    np.testing.assert_allclose(zeroed.gradients["a.bias"], [12 / (13 + EPS)])
    skipped = expected(policy, gradients, weights, on_nonfinite="skip")
    assert skipped.skipped
    np.testing.assert_array_equal(skipped.gradients["c"], [1.0, bad])
    np.testing.assert_array_equal(skipped.gradients["a.bias"], [12.0])
    assert not np.isfinite(skipped.total_norm)
    with pytest.raises(FloatingPointError, match="c"):
        expected(policy, gradients, weights, on_nonfinite="error")


def test_an_unknown_policy_or_argument_is_refused():
    with pytest.raises(ValueError, match=r"no policy 'clip'; there are \['adagc', 'agc'"):
        expected({"name": "clip"}, G, W)
    with pytest.raises(TypeError, match="max_nrom"):
        expected({"name": "global_norm", "max_nrom": 1.0}, G, W)


@pytest.mark.parametrize("of", [np.array, torch.tensor])
def test_no_input_is_changed(of):
    gradients = {"w": of([[3.0, 3.0]])}
    expected({"name": "value", "clip_value": 1.0}, gradients, {"w": of([[1.0, 1.0]])})
    assert (gradients["w"] == 3.0).all()


def test_tensors_are_taken_whatever_their_dtype():
    """And whether autograd, a conjugate view or a sparse layout holds them."""
    policy = {"name": "agc", "clip_factor": 0.1}
    values = torch.tensor([[3.0, -4.0], [0.5, 0.0]])
    for made in (
        values.bfloat16(), values.half(), values.double().requires_grad_(), values.to_sparse(),
        torch.complex(values, values).conj(), torch.complex(values, values).conj().imag,
    ):  # fmt: skip
        dense = made.detach().to_dense().resolve_conj().resolve_neg()
        array = (dense if dense.is_complex() else dense.double()).numpy()
        found, want = (
            expected(policy, {"w": made}, {"w": made}),
            expected(policy, {"w": array}, {"w": array}),
        )
        assert found.total_norm == want.total_norm > 0
        np.testing.assert_array_equal(found.gradients["w"], want.gradients["w"])


@pytest.mark.ranks(2)
def test_a_part_of_a_tensor_is_refused():
    mesh = init_device_mesh("cpu", (2,))
    part = DTensor.from_local(torch.ones(2), mesh, [Shard(0)])
    with pytest.raises(TypeError, match=r"a DTensor.*full_tensor\(\)"):
        expected({"name": "measure"}, {"w": part}, {"w": part})


@pytest.mark.parametrize("magnitude", [5e-324, 1e-310, 1e-200, 1.0, 1e200, 4e307])
@pytest.mark.parametrize("norm_type", [0.5, 1, 2, 3, 10, np.inf])
def test_norms_hold_at_every_magnitude(magnitude, norm_type):
    # n equal elements: the norm is n^(1/p) times one of them. Exact integers where 1/p is one.
    values = np.full(4, magnitude)
    factor = 1.0 if norm_type == np.inf else 4.0 ** (1 / norm_type)
    want = float(Fraction(magnitude) * Fraction(factor)) if magnitude < 1e307 else np.inf
    if magnitude >= 1e307 and factor <= 4:
        want = magnitude * factor
    found = norm(values, norm_type)
    # A subnormal norm is itself rounded to a multiple of the smallest.
    assert found == pytest.approx(want, rel=1e-14, abs=5e-324)


def test_norms_of_nothing_and_of_zeros():
    assert norm([]) == 0.0
    assert norm(np.zeros((2, 3)), 0.5) == 0.0
    assert norm(np.zeros((2, 0)), 2.0, (1,)).tolist() == [[0.0], [0.0]]
    nothing = expected({"name": "global_norm", "max_norm": 1.0}, {}, {})
    assert (nothing.total_norm, nothing.coefficient) == (0.0, 1.0)
