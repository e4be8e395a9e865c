"""Every policy under every sharding, against the float64 oracle."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist

from distclip import GradClipper
from distclip.config import load
from distclip.testing import assert_rounded, expected
from distclip.testing.cases import LAYOUTS, POLICIES, ROUNDINGS
from tests.sharded import shard, whole


def build(configuration: Any) -> Any:
    """The library's policy from the same words as the oracle's."""
    from distclip import policies

    if isinstance(configuration, list):
        return policies.chain(*map(build, configuration))
    if "by_name" in configuration:
        return policies.by_name(
            {k: None if v is None else build(v) for k, v in configuration["by_name"].items()},
            default=None if configuration["default"] is None else build(configuration["default"]),
        )
    return load({"policy": configuration}).policy


def check(
    configuration: Any, layout: str, kind: str, *, roundings: int = 1, seed: int = 0, **options: Any
) -> None:
    """One policy on one sharding: norms, coefficients and every local element."""
    values = whole(kind, seed=seed)
    model = shard(layout, values)
    model.set_gradients(values.gradients)
    gradients, weights = values.arrays()
    want = expected(configuration, gradients, weights)
    report = GradClipper(model.named(), build(configuration), **options).clip_()

    assert report.total_norm.item() == pytest.approx(want.total_norm, rel=1e-6)
    for name, norm in report.parameter_norms.items():
        assert norm == pytest.approx(want.parameter_norms[name], rel=1e-6), name
    if not math.isnan(report.clipped_norm.item()):
        rounding = 1e-6 if kind == "float32" else 4e-3
        assert report.clipped_norm.item() == pytest.approx(want.clipped_norm, rel=rounding)
    text = str(configuration)
    # The norms of a second pass are those of elements that the first has rounded.
    error = 2.0**-8 if roundings == 3 and kind != "float32" else 3e-7
    for name, gradient in model.local_gradients():
        full = want.gradients[name]
        if full is None:
            assert gradient is None
            continue
        assert gradient is not None
        part = full.reshape(-1)[model.elements[name].numpy()]
        assert_rounded(gradient, part, ulps=roundings, coefficient_error=error, name=name)
    if dist.is_initialized() and dist.get_world_size() > 1:
        bits = torch.tensor(
            [
                report.coefficient.item(),
                report.total_norm.item(),
                *report.parameter_coefficients.values(),
            ],
            dtype=torch.float64,
        )
        everybody = [torch.empty_like(bits) for _ in range(dist.get_world_size())]
        dist.all_gather(everybody, bits)
        for other in everybody:
            assert torch.equal(other.view(torch.int64), bits.view(torch.int64))
    if text.count("'agc'") > 1:
        assert report.coefficient.item() <= want.coefficient * (1 + 2e-6)
    elif "value" not in text:
        assert report.coefficient.item() == pytest.approx(want.coefficient, rel=2e-6)


@pytest.mark.ranks(1, 2, 3, 4)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_policy(layout: str) -> None:
    for label, configuration in POLICIES.items():
        try:
            check(configuration, layout, "float32", roundings=ROUNDINGS.get(label, 1))
        except Exception as error:
            raise AssertionError(f"policy {label!r}: {error}") from error


@pytest.mark.ranks(1, 2, 4)
@pytest.mark.parametrize("kind", ["bfloat16", "float16", "mixed"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_dtype(layout: str, kind: str) -> None:
    for label, configuration in POLICIES.items():
        try:
            check(configuration, layout, kind, roundings=ROUNDINGS.get(label, 1), seed=1)
        except Exception as error:
            raise AssertionError(f"policy {label!r}: {error}") from error
