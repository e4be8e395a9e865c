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
from tests.sharded import shard, whole

LAYOUTS = ["plain", "fsdp2", "hsdp", "tp", "replicate", "fsdp2_tp", "mixed"]

POLICIES: dict[str, Any] = {
    "measure": {"name": "measure"},
    "global": {"name": "global_norm", "max_norm": 1.0},
    "global loose": {"name": "global_norm", "max_norm": 1e4},
    "global p=0.5": {"name": "global_norm", "max_norm": 1.0, "norm_type": 0.5},
    "global p=1": {"name": "global_norm", "max_norm": 1.0, "norm_type": 1.0},
    "global p=3": {"name": "global_norm", "max_norm": 1.0, "norm_type": 3.0},
    "global p=12": {"name": "global_norm", "max_norm": 1.0, "norm_type": 12.0},
    "global p=inf": {"name": "global_norm", "max_norm": 1.0, "norm_type": math.inf},
    "value": {"name": "value", "clip_value": 0.5},
    "parameter": {"name": "parameter_norm", "max_norm": 1.0},
    "parameter p=inf": {"name": "parameter_norm", "max_norm": 0.5, "norm_type": math.inf},
    "block rms": {"name": "block_rms", "threshold": 0.5},
    "agc": {"name": "agc", "clip_factor": 0.1},
    "agc strict": {"name": "agc", "clip_factor": 0.001},
    "agc tensor": {"name": "agc", "clip_factor": 0.1, "unit": "tensor"},
    "agc experts": {"name": "agc", "clip_factor": 0.1, "unit_dims": {"experts.*": [0, 1]}},
    "agc columns": {"name": "agc", "clip_factor": 0.1, "unit_dims": {"*.weight": [1]}},
    "dreamer": {"name": "dreamer_agc"},
    # One step each; test_trajectory.py has 200.
    "autoclip": {"name": "autoclip", "window": 100},
    "zclip": {"name": "zclip"},
    "adagc": {"name": "adagc"},
    "skip spikes": {"name": "skip_spikes"},
    "chain scales": [
        {"name": "global_norm", "max_norm": 5.0},
        {"name": "parameter_norm", "max_norm": 1.0},
        {"name": "block_rms", "threshold": 0.1},
        {"name": "global_norm", "max_norm": 0.5, "norm_type": 1.0},
    ],
    "chain agc, global": [
        {"name": "agc", "clip_factor": 0.1},
        {"name": "global_norm", "max_norm": 0.5},
    ],
    "chain global, agc": [
        {"name": "global_norm", "max_norm": 5.0, "norm_type": math.inf},
        {"name": "agc", "clip_factor": 0.01},
        {"name": "dreamer_agc", "clip": 0.005},
    ],
    "chain agc twice": [
        {"name": "agc", "clip_factor": 0.1},
        {"name": "agc", "clip_factor": 0.05, "unit_dims": {"experts.*": [0, 1]}},
        {"name": "global_norm", "max_norm": 0.1},
    ],
    "chain value first": [
        {"name": "value", "clip_value": 0.5},
        {"name": "agc", "clip_factor": 0.1},
        {"name": "global_norm", "max_norm": 0.5},
    ],
    "chain value between": [
        {"name": "global_norm", "max_norm": 5.0},
        {"name": "value", "clip_value": 0.05},
        {"name": "parameter_norm", "max_norm": 0.1},
    ],
    "by name": {
        "by_name": {
            "*.bias": None,
            "embed*": {"name": "value", "clip_value": 0.1},
            "conv*": [
                {"name": "global_norm", "max_norm": 0.5},
                {"name": "value", "clip_value": 0.1},
            ],
        },
        "default": {"name": "agc", "clip_factor": 0.1},
    },
    "by name in a chain": [
        {"by_name": {"fc*": {"name": "agc", "clip_factor": 0.05}}, "default": None},
        {"name": "global_norm", "max_norm": 1.0},
    ],
}


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


ROUNDINGS = {"chain value first": 2, "by name": 2, "chain value between": 3, "chain agc twice": 3}
"""How often an element is rounded: once, but a clamp rounds its bound to the dtype, and a second
pass scales (by norms of rounded elements) what the first one has rounded."""


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
