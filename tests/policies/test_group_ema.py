"""``group_ema``: the published scales, where its average begins, and what a group is."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch

from distclip import ConfigurationError, GradClipper, policies
from distclip.policies import ParameterInfo, Statistics
from distclip.policies._group_ema import functional_group

POLICY = policies.group_ema(1.2, 0.9, 0.95, max_down_scale=0.1, max_up_scale=1.5)


def scales(policy: policies.GroupEMA, table: np.ndarray) -> np.ndarray:
    """By step and column; each column is a group of its own."""
    infos = [ParameterInfo(f"layers.0.proj{i}_x.weight", (2,)) for i in range(table.shape[1])]
    state, rows = policy.init(infos), []
    for row in table:
        actions: Any
        actions, state = policy.update(Statistics(infos, {2.0: torch.tensor(row)}), state)
        rows.append(actions[0].coefficients.numpy())
        assert state["ema"].isfinite().all()
    return np.array(rows)


def test_the_published_scales(frontier: dict[str, np.ndarray]) -> None:
    want = frontier["group_ema|from the first norm"]
    assert (want > 1).any()
    assert (want < 1).any()
    np.testing.assert_allclose(scales(POLICY, frontier["in|norms"]), want, rtol=1e-9)


def test_the_band_moves_by_the_schedule(frontier: dict[str, np.ndarray]) -> None:
    want, fixed = frontier["group_ema|schedule"], frontier["group_ema|from the first norm"]
    policy = dataclasses.replace(POLICY, high_late=1.02, low_late=0.5, late_start=50, late_stop=150)
    np.testing.assert_allclose(scales(policy, frontier["in|norms"]), want, rtol=1e-9)
    assert np.array_equal(want[:51], fixed[:51])
    assert not np.array_equal(want[51:150], fixed[51:150])


def test_an_average_from_0_scales_nearly_everything_down(frontier: dict[str, np.ndarray]) -> None:
    """The authors' code begins so; the first norm is where this one begins."""
    published, ours = frontier["group_ema|from 0"], scales(POLICY, frontier["in|norms"])
    assert (published[1:40] < 0.2).all()
    assert (ours[1:40] < 0.2).sum() == 0


def test_nothing_that_is_not_finite_enters() -> None:
    table = np.full((40, 2), 3.0)
    table[20] = math.nan, 3.0
    table[25] = 3.0, math.inf
    table[30] = 0.0, 0.0
    found = scales(POLICY, table)
    assert math.isnan(found[20, 0])
    assert (np.delete(found, [20, 25], 0) == 1.0).all()


def test_a_group_is_what_modules_of_one_kind_have_in_common() -> None:
    names = {
        "layers.0.attn.q_proj.weight": "q_proj",
        "layers.1.attn.q_proj.bias": "q_proj",
        "layers.1.attn.q_proj.lora_A.default.weight": "q_proj",
        "layers.1.attn.q_proj.base_layer.weight": "q_proj",
        "layers.1.mlp.experts.3.w1.weight": "w1",
        "layers.1.mlp.experts.w1": "experts",
        "embed_tokens.weight": "embed_tokens",
        "0.weight": "",
        "scale": "",
        "own@2": "",
    }
    assert {name: functional_group(name) for name in names} == names
    layers = [(f"layers.{n}.{kind}.weight", torch.nn.Parameter(torch.ones(4)))
              for n in range(2) for kind in ("up", "down")]  # fmt: skip
    clipper = GradClipper(layers, policies.group_ema())
    for step in range(3):
        for name, parameter in layers:
            large = 10.0 if step == 2 and name == "layers.1.up.weight" else 1.0
            parameter.grad = torch.full((4,), large)
        report = clipper.clip_()
    joint = math.sqrt(4 * 100 + 4)
    want = 1.05 * math.sqrt(8) / joint
    assert report.parameter_coefficients == {
        "layers.0.up.weight": pytest.approx(want),
        "layers.0.down.weight": 1.0,
        "layers.1.up.weight": pytest.approx(want),
        "layers.1.down.weight": 1.0,
    }


def test_impossible_arguments() -> None:
    for arguments, message in (
        ({"high_mult": 0.9}, "high_mult must be >= 1"),
        ({"low_mult": 1.1}, "low_mult must be at most 1"),
        ({"max_up_scale": 0.5}, "max_up_scale must be >= 1"),
        ({"ema_beta": 1.0}, "ema_beta must be >= 0 and < 1"),
        ({"high_late": 0.9, "late_stop": 5}, "high_late must be >= 1"),
        ({"low_late": 1.1, "late_stop": 5}, "low_late must be at most 1"),
        ({"low_late": 0.5}, "late_stop must be a whole number of at least 1"),
        ({"high_late": 2.0, "late_start": 9, "late_stop": 9}, "late_stop .* at least 10"),
        ({"late_start": -1}, "late_start must be a whole number of at least 0"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            policies.group_ema(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"high_late": 1.2, "late_start": "x", "late_stop": 5}, "late_start must be a number"),
        ({"late_start": 5, "late_stop": 10}, "nothing moves"),
        ({"late_start": 5}, "nothing moves"),
    ],
)
def test_a_schedule_that_cannot_be_meant(given: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        policies.group_ema(**given)
